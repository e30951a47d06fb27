"""What a teacher can say of a policy's sequence: log-probs where both mean the same token, NaN everywhere else.

NaN is "not known", never "no opinion": a loss leaves such tokens out. Three things are not known of a teacher with the
policy's vocabulary:

    beyond its context              it reads what fits, from the beginning
    from a token on that it lacks   the policy's vocabulary may have more rows
    at the policy's end token       if it ends its own answers with another one (a base and a chat model): its log-prob
                                    there speaks of a habit of writing, not of the answer, and is hugely negative
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int32

from rlkd.core.errors import NoWorkers, WorkerLost
from rlkd.core.ports import Completion, Model, Sampling
from rlkd.core.types import TopK

Sequences = Sequence[Int32[np.ndarray, "_"]]
Known = TypeVar("Known")


@dataclass
class Teacher:
    """The port `Model` around another one. `foreign_ends` end the policy's answers and not the teacher's."""

    name: str
    model: Model
    context: int  # tokens it can read
    vocabulary: int  # token ids it has
    known_ids: int  # token ids that the policy has: of others it cannot learn
    foreign_ends: tuple[int, ...] = ()
    report: Callable[[str, str], None] = lambda *_: None
    unread: int = field(default=0, init=False)  # sequences of which it read less than all

    async def generate(
        self, tokens: Int32[np.ndarray, "p"], n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        return await self.model.generate(tokens, n, seed, sampling)

    async def logp(self, sequences: Sequences) -> list[Float32[np.ndarray, "_"]]:
        read = self._readable(sequences)
        known = iter(await self.model.logp([r for r in read if len(r)])) if any(map(len, read)) else iter(())
        found = []
        for tokens, part in zip(sequences, read, strict=True):
            logp = np.full(len(tokens), np.nan, np.float32)
            if len(part):
                logp[: len(part)] = next(known)
            logp[self._unsayable(tokens)] = np.nan
            found.append(logp)
        return found

    async def topk(self, sequences: Sequences, k: int) -> list[TopK]:
        """Where one of the likeliest is no token of the policy, nothing is known of the place."""
        read = self._readable(sequences)
        known = iter(await self.model.topk([r for r in read if len(r)], k)) if any(map(len, read)) else iter(())
        found = []
        for tokens, part in zip(sequences, read, strict=True):
            ids, logp = np.zeros((len(tokens), k), np.int32), np.full((len(tokens), k), np.nan, np.float32)
            if len(part):
                top = next(known)
                ids[: len(part)], logp[: len(part)] = top.ids, top.logp
            logp[self._unsayable(tokens) | (ids >= self.known_ids).any(1)] = np.nan
            ids[np.isnan(logp)] = 0
            found.append(TopK(ids, logp))
        return found

    def _unsayable(self, tokens: Int32[np.ndarray, "n"]) -> np.ndarray:
        return np.isin(tokens, self.foreign_ends)

    def _readable(self, sequences: Sequences) -> list[Int32[np.ndarray, "_"]]:
        """The beginning of each that the teacher can read; counted and reported where that is not all."""
        read = []
        for tokens in sequences:
            lacking = np.flatnonzero(tokens >= self.vocabulary)
            until = min(len(tokens), self.context, *lacking[:1].tolist())
            read.append(tokens[:until])
            self._count(len(tokens), until)
        return read

    def _count(self, has: int, until: int) -> None:
        """Told the 1st, 2nd, 4th, 8th … time: often enough to notice, never a flood."""
        if until == has:
            return
        self.unread += 1
        if self.unread & (self.unread - 1) == 0:
            why = f"its context of {self.context}" if until == self.context else "a token that it lacks"
            text = f"{self.name}: reads {until} of {has} tokens ({why}); the rest stays without its log-probs"
            self.report("teacher", f"{text}. {self.unread} sequences so far")


@dataclass
class Dispensable:
    """The port `Model` around a pool that a run may go on without: while it has no worker nothing is known (NaN), and
    every sequence that goes without is counted and told of. Only log-probs: a text cannot be unknown."""

    name: str
    model: Model
    report: Callable[[str, str], None] = lambda *_: None
    asked: int = field(default=0, init=False)  # sequences
    skipped: int = field(default=0, init=False)

    async def generate(
        self, tokens: Int32[np.ndarray, "p"], n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        return await self.model.generate(tokens, n, seed, sampling)

    async def logp(self, sequences: Sequences) -> list[Float32[np.ndarray, "_"]]:
        known = await self._unless_lost(sequences, self.model.logp(sequences))
        return known or [np.full(len(tokens), np.nan, np.float32) for tokens in sequences]

    async def topk(self, sequences: Sequences, k: int) -> list[TopK]:
        known = await self._unless_lost(sequences, self.model.topk(sequences, k))
        shapes = [(len(tokens), k) for tokens in sequences]
        return known or [TopK(np.zeros(s, np.int32), np.full(s, np.nan, np.float32)) for s in shapes]

    async def _unless_lost(self, sequences: Sequences, call: Awaitable[Known]) -> Known | None:
        self.asked += len(sequences)
        try:
            return await call
        except (WorkerLost, NoWorkers) as lost:
            before, self.skipped = self.skipped, self.skipped + len(sequences)
            if before.bit_length() != self.skipped.bit_length():  # at the 1st, 2nd, 4th, 8th … of them
                share = f"{self.skipped} of {self.asked} sequences so far ({self.skipped / self.asked:.0%})"
                self.report("teacher_skipped", f"{self.name}: went on without its log-probs; {share}. {lost}")
            return None
