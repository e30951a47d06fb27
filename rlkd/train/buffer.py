"""Between producers and the learner: who may start, what is ready, what was turned away.

A slot is the right to have one group under way. There are (staleness + 1)·P of them, fewer when the run is nearly over,
and a trained group's slot is given back only after the new weights are in the samplers. The learner takes groups in the
order of their admission. So a group is at most `staleness` steps old when it is used, and with staleness 0 the run is
the synchronous algorithm.

What a step takes does not depend on who was faster: the P oldest tickets that are not turned away, and with them the
turned-away ones that are older than the youngest of these. If more than `most` are turned away before there are P, the
step takes what is there. Such steps free fewer slots than was counted on, and a group may wait for more steps than it
may be old: its prompt is asked again.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from rlkd.core.ports import Curriculum
from rlkd.core.types import Group, Prompt
from rlkd.train.ledger import Ledger


@dataclass(frozen=True)
class Done:
    """A group whose fate is known: to be trained (`credited`, and `why` is None), or turned away."""

    judged: Group
    credited: Group | None
    why: str | None = None


@dataclass
class Buffer:
    slots: int
    curriculum: Curriculum
    ledger: Ledger = field(default_factory=Ledger)
    _done: dict[int, Done] = field(default_factory=dict)
    _again: list[int] = field(default_factory=list)  # owed by an earlier attempt of the run: they go first
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _active: int = 0

    def __post_init__(self) -> None:
        self._again = sorted(self.ledger.pending, reverse=True)

    async def admit(self) -> tuple[int, Prompt]:
        """Wait for a slot; the next prompt and its ticket. Tickets number the prompts in the order of their drawing."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < self.slots)
            self._active += 1
            if self._again:
                ticket = self._again.pop()
                return ticket, self.ledger.pending[ticket]
            prompt = self.curriculum.draw()
            return self.ledger.admit(prompt), prompt

    async def put(self, ticket: int, done: Done) -> None:
        """A group turned away gives its slot to another prompt at once, and stays owed until a step takes it."""
        async with self._changed:
            self._done[ticket] = done
            self._active -= done.why is not None
            self._changed.notify_all()

    async def take(self, n: int, most: int, too_old: Callable[[Group], bool] = lambda _: False) -> dict[int, Done]:
        """Wait for the n oldest tickets that are not turned away, or for more than `most` that are; they and all before
        the last of them, oldest first. The slots of those to be trained stay taken. Prompts whose groups are too old
        are asked once more."""
        renewed: set[int] = set()
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._front(n, most) is not None)
                front = self._front(n, most)
                assert front is not None
                done = {ticket: self._done[ticket].credited for ticket in front if ticket not in renewed}
                again = [ticket for ticket, group in done.items() if group is not None and too_old(group)]
                if not again:
                    return {ticket: self._done.pop(ticket) for ticket in front}
                for ticket in again:
                    del self._done[ticket]
                renewed |= set(again)
                self._again = sorted({*self._again, *again}, reverse=True)
                self._active -= len(again)
                self._changed.notify_all()

    def _front(self, n: int, most: int) -> list[int] | None:
        """The tickets that make the next step, if all of them are done."""
        front: list[int] = []
        away = 0
        for ticket in sorted(self.ledger.pending):
            if ticket not in self._done:
                return None
            front.append(ticket)
            away += self._done[ticket].why is not None
            if len(front) - away == n or away > most:
                return front
        return None

    async def release(self, slots: int) -> None:
        """Give slots back. For trained groups only after the new weights are in the samplers."""
        async with self._changed:
            self._active -= slots
            self._changed.notify_all()
