"""What looks after a run beside the loop. Each part may be left out."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkd.core.types import Group
from rlkd.train.canary import Canary
from rlkd.train.health import Alarm, Alarms


def nothing() -> dict[str, float]:
    return {}


@dataclass
class Guards:
    alarms: Alarms | None = None  # of a step's numbers
    canary: Canary | None = None  # after a weight sync
    stalled: Callable[[str], Awaitable[None]] | None = None  # nothing moves any more
    counters: Callable[[], Any] = tuple  # what moves while the run does, beside the stages
    settles_in_s: Callable[[], float] = lambda: 0.0  # nodes are going away: what is rebuilt before may go with the next
    metrics: Callable[[], Mapping[str, float]] = nothing  # what others have to add to a step's row

    def begin(self, step: int) -> None:
        """The run goes on after this step."""
        if self.alarms is not None:
            self.alarms.begin(step)

    def row(self) -> dict[str, float]:
        """What the step's row gets beside the learner's numbers."""
        return {**(self.alarms.row() if self.alarms is not None else {}), **self.metrics()}

    async def after_sync(self, step: int) -> dict[str, float]:
        """DivergedError if a sampler does not compute what the learner does."""
        off = await self.canary.check(step) if self.canary is not None else None
        return {} if off is None else {"canary": off}

    def after_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> list[Alarm]:
        """DivergedError if sampler and learner disagree on what was sampled."""
        return [] if self.alarms is None else self.alarms.step(step, groups, metrics)
