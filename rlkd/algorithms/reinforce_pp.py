"""REINFORCE++ — Hu et al. 2025, arXiv:2501.03262.

    A_i,t  = r_i − β Σ_{s≥t} KL_i,s                   `baseline=False`: REINFORCE++, one or more answers a prompt
    A_i,t  = r_i − mean_group(r) − β Σ_{s≥t} KL_i,s   `baseline=True`:  REINFORCE++-baseline
    Â_i,t  = (A_i,t − mean_batch(A)) / std_batch(A)                        normalised over all tokens of the *step*
    J(θ)   = 1/Σ|o_i| Σ_i Σ_t min(ρ Â, clip(ρ, 1±ε) Â)

The normalisation needs every group of the step at once, hence `credit_step`. The KL term is k1 = log μ − log π_ref of
the sampled tokens, summed to the end of the answer (discount 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rlkd.algorithms.grpo import GRPO
from rlkd.core import advantage
from rlkd.core.advantage import sampled_kl, with_advantages
from rlkd.core.batch import Norm
from rlkd.core.types import Group, Origin, Sample


@dataclass(frozen=True)
class ReinforcePP(GRPO):
    name: str = "reinforce_pp"
    norm: Norm = "token"
    baseline: bool = True  # subtract the group's mean first

    kl_in_reward: ClassVar[bool] = True

    def problems(self) -> list[str]:
        return [p for p in super().problems() if self.baseline or "rollout.samples" not in p]

    def credit(self, group: Group) -> Group:
        """A, before the normalisation over the step."""
        group = with_advantages(group, advantage.centered(group.rewards) if self.baseline else group.rewards)
        return replace(group, samples=tuple(self._less_kl(s) for s in group.samples)) if self.beta else group

    def _less_kl(self, sample: Sample) -> Sample:
        assert sample.advantage is not None
        to_go = np.cumsum(sampled_kl(sample)[::-1])[::-1]
        return replace(sample, advantage=(sample.advantage - self.beta * to_go).astype(np.float32))

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Â: zero mean and unit variance over the step's tokens that are trained."""
        parts = [s.advantage[s.origin == Origin.POLICY] for g in groups for s in g.samples if s.advantage is not None]
        values = np.concatenate(parts).astype(np.float64)
        no_contrast = values.min() == values.max()  # rounding must not be blown up by a std of 0
        mean, scale = values.mean(), 1.0 if no_contrast else values.std() + 1e-8

        def normalised(sample: Sample) -> Sample:
            assert sample.advantage is not None
            return replace(sample, advantage=((sample.advantage - mean) / scale).astype(np.float32))

        return [replace(g, samples=tuple(normalised(s) for s in g.samples)) for g in groups]
