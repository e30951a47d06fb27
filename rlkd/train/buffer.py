"""Between producers and the learner: who may start, what is owed, what is ready.

A slot is the right to have one group under way. There are (staleness + 1)·P of them, and a trained group's slot is
given back only after the new weights are in the samplers. The learner takes groups in the order of their admission.
So a group is at most `staleness` steps old when it is used, and with staleness 0 the run is the synchronous algorithm.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from rlkd.core.ports import Curriculum
from rlkd.core.types import Group, Prompt


@dataclass
class Buffer:
    slots: int
    curriculum: Curriculum
    owed: dict[int, Prompt] = field(default_factory=dict)  # admitted and not yet spent, by ticket
    next_ticket: int = 0
    _ready: dict[int, Group] = field(default_factory=dict)
    _again: list[int] = field(default_factory=list)  # owed by an earlier attempt of the run: they go first
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _active: int = 0

    def __post_init__(self) -> None:
        self._again = sorted(self.owed, reverse=True)

    async def admit(self) -> tuple[int, Prompt]:
        """Wait for a slot; the next prompt and its ticket. Tickets number the prompts in the order of their drawing."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < self.slots)
            self._active += 1
            if self._again:
                ticket = self._again.pop()
                return ticket, self.owed[ticket]
            ticket, prompt = self.next_ticket, self.curriculum.draw()
            self.next_ticket += 1
            self.owed[ticket] = prompt
            return ticket, prompt

    async def put(self, ticket: int, group: Group) -> None:
        async with self._changed:
            self._ready[ticket] = group
            self._changed.notify_all()

    async def take(self, n: int) -> dict[int, Group]:
        """Wait until the n oldest tickets under way are ready; their groups, oldest first. Their slots stay taken."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._front(n) is not None)
            front = self._front(n)
            assert front is not None
            return {ticket: self._ready.pop(ticket) for ticket in front}

    def _front(self, n: int) -> list[int] | None:
        oldest = sorted(self.owed)[:n]
        return oldest if len(oldest) == n and all(t in self._ready for t in oldest) else None

    def spend(self, tickets: Iterable[int]) -> None:
        """These prompts are done with: trained, or turned away. A checkpoint from now on does not owe them."""
        for ticket in tickets:
            del self.owed[ticket]

    async def release(self, slots: int) -> None:
        """Give slots back. For trained groups only after the new weights are in the samplers."""
        async with self._changed:
            self._active -= slots
            self._changed.notify_all()
