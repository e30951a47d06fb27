"""DAPO — Decoupled Clip and Dynamic sAmpling Policy Optimization. Yu et al. 2025, arXiv:2503.14476.

    J(θ) = 1/Σ_i|o_i| Σ_i Σ_t min(ρ Â_i, clip(ρ, 1−ε_low, 1+ε_high) Â_i)                         Eq. 8, token-level loss
           subject to  0 < |{i : o_i is right}| < G                                            dynamic sampling, Eq. 11
    r_i ← r_i + 0                              |o_i| ≤ L_max − L_buf
          + ((L_max − L_buf) − |o_i|) / L_buf  up to L_max                              soft overlong punishment, Eq. 13
          − 1                                  beyond

A group whose rewards are all equal is turned away by `credit` (no samples left) and another prompt is drawn;
`schedule.max_turned_away` bounds that. The filter looks at the reward before the length punishment.
"""

from dataclasses import dataclass, replace

import numpy as np

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import Norm
from rlkd.core.types import Group


@dataclass(frozen=True)
class DAPO(GRPO):
    name: str = "dapo"
    clip_high: float = 0.28  # ε_high
    norm: Norm = "token"
    dynamic_sampling: bool = True
    overlong_max: int | None = None  # L_max; None: no length punishment
    overlong_buffer: int = 0  # L_buf
    overlong_weight: float = 1.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.overlong_max is not None and not 0 < self.overlong_buffer <= self.overlong_max:
            found.append(
                f"overlong_buffer={self.overlong_buffer} must be between 1 and overlong_max={self.overlong_max}"
            )
        return found

    def credit(self, group: Group) -> Group:
        """Â after the length punishment; a group without contrast is left without samples."""
        if self.dynamic_sampling and (group.rewards == group.rewards[0]).all():
            return replace(group, samples=())
        return super().credit(self.punished(group))

    def punished(self, group: Group) -> Group:
        """The group with the soft overlong punishment in its rewards and among its scores."""
        if self.overlong_max is None:
            return group
        free = self.overlong_max - self.overlong_buffer
        samples = []
        for sample in group.samples:
            over = (sample.answer_tokens - free) / self.overlong_buffer
            punishment = -self.overlong_weight * float(np.clip(over, 0.0, 1.0))
            scores = {**sample.scores, "overlong": punishment}
            samples.append(replace(sample, reward=sample.reward + punishment, scores=scores))
        return replace(group, samples=tuple(samples))
