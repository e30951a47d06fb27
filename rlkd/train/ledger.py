"""What became of every prompt that was admitted: pending, or resolved in exactly one way.

A prompt's occurrence is its ticket, numbered in the order of admission. It is pending until a step resolves it: trained
in that step, or turned away (and why). The ledger is committed by the same rename as the weights, so whatever happened
after the last commit is gone together with its rows: to train it again is no repetition (reliability_ux.md A4).

`chain` is a digest over every row ever resolved, in order, each with its step. Two runs with the same chain trained the
same prompts in the same steps, whatever was killed in between.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlkd.core.errors import CheckpointError
from rlkd.core.types import Prompt

TRAINED = "trained"
SKIPPED = "not finite"  # the optimizer left the step out (learner.on_nonfinite=skip)


@dataclass(frozen=True)
class Row:
    """A ticket that a step resolves: `what` is TRAINED, SKIPPED, or the reason why it was turned away."""

    ticket: int
    prompt: str  # id
    seed: int
    what: str
    samples: int = 0  # that the optimizer saw


@dataclass
class Ledger:
    next_ticket: int = 0
    frontier: int = 0  # every ticket below is resolved
    pending: dict[int, Prompt] = field(default_factory=dict)
    beyond: set[int] = field(default_factory=set)  # resolved tickets above the frontier
    counts: dict[str, int] = field(default_factory=dict)  # resolved tickets by what became of them
    samples: int = 0  # trained, in all
    chain: str = ""

    def admit(self, prompt: Prompt) -> int:
        """Its ticket."""
        ticket = self.next_ticket
        self.next_ticket += 1
        self.pending[ticket] = prompt
        return ticket

    def resolve(self, step: int, rows: Sequence[Row]) -> None:
        """What step `step` did with these tickets, in this order. RuntimeError if one of them is not pending."""
        if unknown := [r.ticket for r in rows if r.ticket not in self.pending]:
            raise RuntimeError(f"step {step} resolves tickets that are not pending: {unknown}")
        for row in rows:
            del self.pending[row.ticket]
            self.beyond.add(row.ticket)
            self.counts[row.what] = self.counts.get(row.what, 0) + 1
            self.samples += row.samples
        while self.frontier in self.beyond:
            self.beyond.remove(self.frontier)
            self.frontier += 1
        told = repr([(r.ticket, r.prompt, r.seed, r.what, r.samples) for r in rows])
        self.chain = hashlib.blake2b(f"{self.chain}|{step}|{told}".encode(), digest_size=16).hexdigest()

    def drop_pending(self, step: int, why: str) -> None:
        """Nobody will ask these again."""
        self.resolve(step, [Row(ticket, p.id, p.seed, why) for ticket, p in sorted(self.pending.items())])

    def problems(self) -> list[str]:
        """Broken invariants; none in a ledger that was only changed by `admit` and `resolve`."""
        tickets = [*self.pending, *self.beyond]
        found = []
        if sorted(tickets) != list(range(self.frontier, self.next_ticket)):
            found.append("a ticket above the frontier is neither pending nor resolved, or both")
        if self.frontier in self.beyond:
            found.append(f"the frontier {self.frontier} is resolved itself")
        if self.frontier + len(self.beyond) != sum(self.counts.values()):
            found.append(f"{self.frontier + len(self.beyond)} tickets are resolved, but {self.counts} are counted")
        return found

    def state_dict(self) -> dict[str, Any]:
        """For json. RuntimeError if an invariant is broken: such a ledger is never committed."""
        if broken := self.problems():
            raise RuntimeError(f"the ledger is broken: {'; '.join(broken)}")
        return {
            "next_ticket": self.next_ticket,
            "frontier": self.frontier,
            "pending": [[ticket, p.id, p.seed] for ticket, p in sorted(self.pending.items())],
            "beyond": sorted(self.beyond),
            "counts": dict(sorted(self.counts.items())),
            "samples": self.samples,
            "chain": self.chain,
        }

    @classmethod
    def load(cls, state: Mapping[str, Any], prompt: Callable[[str, int], Prompt]) -> "Ledger":
        """What `state_dict` said; `prompt(id, seed)` finds a pending prompt again, or raises KeyError.

        CheckpointError if it cannot be read, is broken, or owes a prompt that the data does not have."""
        try:
            pending = {int(t): prompt(str(i), int(seed)) for t, i, seed in state["pending"]}
            following, frontier = int(state["next_ticket"]), int(state["frontier"])
            counts = {str(what): int(n) for what, n in state["counts"].items()}
            beyond = {int(t) for t in state["beyond"]}
            found = cls(following, frontier, pending, beyond, counts, int(state["samples"]), str(state["chain"]))
            broken = found.problems()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            broken = [f"{type(error).__name__}: {error}"]
        if broken:
            raise CheckpointError(
                "RLKD-K104",
                f"the checkpoint's ledger cannot be used: {'; '.join(broken)}",
                where="driver.json",
                fix="use the data the run began with, or move this checkpoint away to use the one before it",
            )
        return found
