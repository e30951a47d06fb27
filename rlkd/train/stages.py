"""Where the time goes, and what is being waited for."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stages:
    """Seconds of wall time with at least one call under way, per stage; and every wait by name, for the watchdog."""

    seconds: dict[str, float] = field(default_factory=dict)
    waiting: dict[int, tuple[str, float]] = field(default_factory=dict)  # what, since when (monotonic seconds)
    moved: float = field(default_factory=time.monotonic)  # when a stage last began or ended
    _active: dict[str, int] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _next: int = 0

    @contextmanager
    def stage(self, name: str, on: str = "") -> Iterator[None]:
        """Counts as stage `name`; `on` says what exactly is awaited."""
        now = time.monotonic()
        key, self._next = self._next, self._next + 1
        self.moved = now
        self.waiting[key] = (f"{name} {on}".strip(), now)
        if not self._active.get(name):
            self._since[name] = now
        self._active[name] = self._active.get(name, 0) + 1
        try:
            yield
        finally:
            self.moved = time.monotonic()
            del self.waiting[key]
            self._active[name] -= 1
            if not self._active[name]:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - self._since[name]

    def taken(self) -> dict[str, float]:
        """Seconds per stage since the last call; stages under way count up to now."""
        now = time.monotonic()
        for name, active in self._active.items():
            if active:
                self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since[name]
                self._since[name] = now
        seconds, self.seconds = self.seconds, {}
        return seconds

    async def watch(
        self,
        stall_s: float,
        tell: Callable[[str], None],
        stalled: Callable[[str], Awaitable[None]] | None = None,
        counters: Callable[[], Any] = tuple,
    ) -> None:
        """Every `stall_s` seconds, tell of waits older than that: what, and for how long. When besides nothing at all
        has moved for that long (no stage begun or ended, and `counters()`, tokens written and the like, the same),
        `stalled` is called with the waits in words, once until something moves again. Never returns, except by an error
        that `stalled` raises."""
        seen, since, called = counters(), time.monotonic(), False
        while True:
            await asyncio.sleep(stall_s)
            now, new = time.monotonic(), counters()
            if new != seen:
                seen, since = new, now
            still = now - max(since, self.moved) >= stall_s
            called = called and still
            late = self.late(stall_s)
            if not late:
                continue
            tell(f"still waiting ({len(late)}): {late_in_words(late)}")
            if still and stalled is not None and not called:
                called = True
                await stalled(late_in_words(late))

    def late(self, at_least_s: float = 0.0) -> list[tuple[str, float]]:
        """What has been awaited for so long and for how many seconds; the longest first."""
        now = time.monotonic()
        return [(what, now - since) for since, what in sorted((s, w) for w, s in self.waiting.values())
                if now - since > at_least_s]  # fmt: skip


def late_in_words(late: Sequence[tuple[str, float]], most: int = 8) -> str:
    more = f" … and {len(late) - most} more" if len(late) > most else ""
    return "; ".join(f"{what}: {seconds:.0f} s" for what, seconds in late[:most]) + more
