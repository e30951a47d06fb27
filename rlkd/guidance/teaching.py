"""How much a teacher takes part, from step to step: a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

ENDS_ABOVE = 0.01  # beside epsilon, as in ThinkTuning's released schedules
ROUNDING = 1e-12


@dataclass(frozen=True)
class Teaching:
    """pct(t) falls from `start` to `end` over the first third of `steps`, and is 0 from the first step on at which it
    is at most epsilon + 0.01. With u = min(t, q)/q, q = max(1, ⌊steps/3⌋):

        linear       start − (start − end)·u
        cosine       end + (start − end)·(1 + cos πu)/2
        exponential  start·(end/start)^u
        constant     start

    All fall, so "from the first such step on" needs no memory. The defaults teach for 8 steps.
    """

    schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    start: float = 0.1
    end: float = 0.01
    steps: int = 50  # of the run: write ${schedule.steps}
    epsilon: float = 0.05

    def problems(self) -> list[str]:
        found = []
        if not 0 < self.start <= 1:
            found.append(f"start={self.start} must be above 0 and at most 1")
        if not 0 <= self.end <= self.start:
            found.append(f"end={self.end} must be between 0 and start={self.start}")
        if self.steps < 1:
            found.append(f"steps={self.steps} must be at least 1")
        if self.epsilon < 0:
            found.append(f"epsilon={self.epsilon} must not be negative")
        if not found and not self.at(0):
            found.append(f"start={self.start} is at most epsilon + 0.01: the teacher would never be asked")
        return found

    def pct(self, step: int) -> float:
        """The share the schedule names at a step (0, 1, …)."""
        horizon = max(1, self.steps // 3)
        u = min(step, horizon) / horizon
        match self.schedule:
            case "linear":
                return self.start - (self.start - self.end) * u
            case "cosine":
                return self.end + (self.start - self.end) * (1 + math.cos(math.pi * u)) / 2
            case "exponential":
                return float(self.start * (self.end / self.start) ** u)
            case "constant":
                return self.start

    def at(self, step: int) -> float:
        """The share in force at a step: 0 once the teacher is off."""
        pct = self.pct(step)
        return 0.0 if pct <= self.epsilon + ENDS_ABOVE + ROUNDING else pct


def how_many(eligible: int, pct: float) -> int:
    """k = max(1, ⌊E·pct⌋) of E rows; none of none, and none when the teacher is off."""
    return max(1, math.floor(eligible * pct + ROUNDING)) if eligible and pct > 0 else 0
