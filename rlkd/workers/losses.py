"""Why a worker was lost, and what that costs its place. Pure; times are monotonic seconds.

infra     its process, engine or node broke: a replacement after a pause that doubles, so many in a row and so many
          in a window; then the place is out of use
memory    it ran out of memory: twice in a row ends the run, for a third would too
preempt   its node was taken away: not counted
"""

import re
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from ray.exceptions import OutOfMemoryError

from rlkd.core.errors import WorkerLost

# Of torch, CUDA, Python and Ray's memory monitor. Not "OOM killer", which Ray names as a cause of every sudden end.
_MEMORY = re.compile(
    r"MemoryError|OutOfMemory|out of memory|can't allocate memory|running low on memory", re.IGNORECASE
)
OUT_OF_MEMORY = 2  # times in a row
# Ray's words for a node whose raylet got SIGTERM: `ray stop`, a pod that ends.
_TAKEN = "node was terminated expectedly"


class Kind(StrEnum):
    INFRA = "infra"
    MEMORY = "memory"
    PREEMPT = "preempt"


class CannotStart(WorkerLost):
    """A new worker that lives and says what keeps it from starting. Others work: no memory, where it is, is no reason
    to end the run."""


def kind_of(lost: WorkerLost, draining: bool = False, memory_full: bool = False) -> Kind:
    """`draining`: its node was known to go away. `memory_full`: the kernel killed for memory meanwhile, or there was
    next to none left at its last sign of life; that tells only of a process that died."""
    cause = lost.__cause__
    if draining or getattr(cause, "preempted", False) or _TAKEN in str(cause):
        return Kind.PREEMPT
    if isinstance(lost, CannotStart):
        return Kind.INFRA
    died = re.search("Died|Unavailable", type(cause).__name__) is not None  # the latter where Ray hears of it late
    if isinstance(cause, OutOfMemoryError) or _MEMORY.search(str(lost)) or (died and memory_full):
        return Kind.MEMORY
    return Kind.INFRA


@dataclass
class Losses:
    """Of one place for a worker."""

    replacements: int = 3  # in a row, without an answer in between
    window_s: float = 600.0
    in_window: int = 10  # however many answers came in between
    in_a_row: int = 0
    last: Kind | None = None
    _memory: int = 0  # losses for memory in a row, however many answers came in between
    _recent: deque[float] = field(default_factory=deque)

    def charge(self, kind: Kind, now: float) -> str | None:
        """Count a loss; why the place must not be used any more, if it must not."""
        self.last = kind
        if kind is Kind.PREEMPT:
            return None
        self.in_a_row += 1
        self._memory = self._memory + 1 if kind is Kind.MEMORY else 0
        self._recent.append(now)
        while now - self._recent[0] > self.window_s:
            self._recent.popleft()
        if not self.replacements:
            return "lost, and is not to be replaced"
        if self.in_a_row > self.replacements:
            return f"lost {self.in_a_row} times in a row without an answer"
        if len(self._recent) > self.in_window:
            return f"lost {len(self._recent)} times within {self.window_s:g} s"
        return None

    @property
    def out_of_memory(self) -> bool:
        return self._memory >= OUT_OF_MEMORY

    def answered(self) -> None:
        self.in_a_row = 0

    def pause_s(self, backoff_s: float) -> float:
        """Before the next worker is made."""
        return backoff_s * 2 ** (self.in_a_row - 2) if self.in_a_row > 1 else 0.0


@dataclass
class Progress:
    """Of one worker: whether tokens come while there is work."""

    tokens: int = 0
    since: float = 0.0  # when the last one was seen to have come, or the work began

    def begin(self, now: float) -> None:
        """Work begins, or something that writes no tokens has just ended."""
        self.since = now

    def seen(self, tokens: int, at_work: bool, now: float) -> float:
        """For how many seconds it has had work and written nothing."""
        if tokens != self.tokens or not at_work:
            self.tokens, self.since = tokens, now
        return now - self.since
