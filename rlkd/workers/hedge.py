"""A call that is late is asked of a second worker too, and the first answer is taken.

Late is what takes `factor` times as long as nine of ten recent calls, and at least `floor_s`. How long an answer will
be is not known beforehand, and a late one may only be long: so only who has nothing, or clearly less, to do is asked.
"""

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from rlkd.core.errors import NoWorkers, WorkerLost
from rlkd.workers.ask import Slot

RECENT, ENOUGH = 100, 10  # calls that say what is usual; before there are enough nothing is late


@dataclass(eq=False)
class Try:
    """A call under way on a worker. It is the pool's to give back what the worker had to do."""

    slot: Slot
    handle: Any
    began: float  # monotonic
    answer: "asyncio.Task[Any]"

    @property
    def lost(self) -> bool:
        """Whether it is over because its worker is."""
        t = self.answer
        return t.done() and not t.cancelled() and isinstance(t.exception(), WorkerLost | NoWorkers)

    def gave(self, usable: Callable[[Any], bool]) -> bool:
        """Whether there is an answer that can be used."""
        t = self.answer
        return t.done() and not t.cancelled() and t.exception() is None and usable(t.result())


class Pace:
    """Seconds that recent calls took. Calls that may write more tokens (to a power of two) are counted apart."""

    def __init__(self, factor: float, floor_s: float) -> None:
        self._factor, self._floor_s = factor, floor_s
        self._recent: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def took(self, max_tokens: int, seconds: float) -> None:
        self._recent[max_tokens.bit_length()].append(seconds)

    def late_s(self, max_tokens: int) -> float | None:
        """A call is late after this; None: not known yet."""
        recent = sorted(self._recent[max_tokens.bit_length()])
        if len(recent) < ENOUGH:
            return None
        return max(self._floor_s, self._factor * recent[math.ceil(0.9 * len(recent)) - 1])


async def winner(
    first: Try, late_s: float | None, again: Callable[[], Awaitable[Try | None]], usable: Callable[[Any], bool]
) -> tuple[Try, Try | None]:
    """Who has the answer, or the error that is raised; and the other one, if a second was asked: it may not be over.

    After `late_s` (None: never) `again` asks a second worker, as soon as one has time; None if nobody may be asked.
    Its errors, and answers that are not `usable`, count for nothing while the first is under way. Nobody is left at
    work when this is cancelled.
    """
    second: Try | None = None
    asking: asyncio.Future[Try | None] | None = None
    try:
        if await _over(first, late_s):
            return first, None
        asking = asyncio.ensure_future(again())
        await asyncio.wait({first.answer, asking}, return_when=asyncio.FIRST_COMPLETED)
        second = asking.result() if asking.done() else None
        if second is None:
            await _over(first)
            return first, None
        await asyncio.wait({first.answer, second.answer}, return_when=asyncio.FIRST_COMPLETED)
        if first.lost:
            await _over(second)
        elif not second.gave(usable):
            await _over(first)
            if first.lost:
                await _over(second)
        second_wins = second.gave(usable) and (first.lost or not first.answer.done())
        return (second, first) if second_wins else (first, second)
    except BaseException:
        if asking is not None and asking.done() and not asking.cancelled() and asking.exception() is None:
            second = asking.result()
        for under_way in (first, second):
            if under_way is not None:
                under_way.answer.cancel()
        raise
    finally:
        if asking is not None:
            asking.cancel()


async def _over(call: Try, timeout_s: float | None = None) -> bool:
    """Wait for its end, whatever that is; False if it is not over by then."""
    return bool((await asyncio.wait({call.answer}, timeout=timeout_s))[0])
