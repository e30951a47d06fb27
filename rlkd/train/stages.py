"""Where the time goes, and what is being waited for."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stages:
    """Seconds of wall time with at least one call under way, per stage; and every wait by name, for the watchdog."""

    seconds: dict[str, float] = field(default_factory=dict)
    waiting: dict[int, tuple[str, float]] = field(default_factory=dict)  # what, since when (monotonic seconds)
    _active: dict[str, int] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _next: int = 0

    @contextmanager
    def stage(self, name: str, on: str = "") -> Iterator[None]:
        """Counts as stage `name`; `on` says what exactly is awaited."""
        now = time.monotonic()
        key, self._next = self._next, self._next + 1
        self.waiting[key] = (f"{name} {on}".strip(), now)
        if not self._active.get(name):
            self._since[name] = now
        self._active[name] = self._active.get(name, 0) + 1
        try:
            yield
        finally:
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

    async def watch(self, stall_s: float, tell: Callable[[str], None]) -> None:
        """Every `stall_s` seconds, tell of waits older than that: what, and for how long. Never returns."""
        while True:
            await asyncio.sleep(stall_s)
            now = time.monotonic()
            late = sorted((since, what) for what, since in self.waiting.values() if now - since > stall_s)
            if late:
                lines = [f"{what}: {now - since:.0f} s" for since, what in late[:8]]
                more = f" … and {len(late) - 8} more" if len(late) > 8 else ""
                tell(f"still waiting ({len(late)}): " + "; ".join(lines) + more)
