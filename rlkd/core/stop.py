"""One question to one run: stop, please. Many may ask (a signal, a node that drains, a clock); every phase looks."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

KINDS = ("signal", "drain", "deadline", "user")


@dataclass(frozen=True)
class StopRequest:
    """Who asks, in a word (`KINDS`) and in a sentence for the user, and by when the process must be gone."""

    kind: str
    text: str
    deadline: float | None = None  # in time.monotonic()'s seconds; None: nobody knows

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a stop request is one of {', '.join(KINDS)}, not {self.kind!r}")


class Stop:
    """Asked from any thread or signal handler, awaited in any event loop.

    Without a lock: a signal handler runs in the middle of whatever its own thread is doing, also in here. Appending to
    a list cannot be interrupted, and everything else is read off that list.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: list[StopRequest] = []
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def ask(self, request: StopRequest) -> None:
        """The first request counts, by its words; the earliest deadline of all requests is the one that holds."""
        self._asked.append(request)
        for loop, event in tuple(self._waiting):
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    @property
    def request(self) -> StopRequest | None:
        """The first request, with the earliest deadline known by now; None while nobody has asked."""
        asked = tuple(self._asked)
        if not asked:
            return None
        deadlines = [r.deadline for r in asked if r.deadline is not None]
        return replace(asked[0], deadline=min(deadlines, default=None))

    def is_set(self) -> bool:
        return bool(self._asked)

    async def wait(self) -> StopRequest:
        """The request, as soon as there is one. A deadline that comes later is seen in `request` and `left_s`."""
        entry = (asyncio.get_running_loop(), asyncio.Event())
        self._waiting.append(entry)  # before looking: `ask` appends first and wakes then, so that none is missed
        try:
            if not self._asked:
                await entry[1].wait()
        finally:
            self._waiting.remove(entry)
        request = self.request
        assert request is not None
        return request

    def left_s(self) -> float | None:
        """Seconds until the process must be gone, not below 0; None if nobody has asked, or knows."""
        request = self.request
        if request is None or request.deadline is None:
            return None
        return max(0.0, request.deadline - self._clock())


def seconds_until(when: str, now: float) -> float:
    """Seconds from `now` (Unix time) to `when`: a number of seconds, or an ISO time (2026-11-21T18:00+01:00; without a
    zone: this machine's). Negative if it is over. ValueError if it is neither."""
    try:
        seconds = float(when)
    except ValueError:
        return datetime.fromisoformat(when).timestamp() - now
    if not 0 < seconds < math.inf:
        raise ValueError(f"{when} is no number of seconds")
    return seconds
