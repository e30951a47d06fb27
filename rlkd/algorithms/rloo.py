"""RLOO — REINFORCE Leave-One-Out. Ahmadian et al. 2024, arXiv:2402.14740.

    ∇J(θ) = 1/G Σ_i [ R_i − 1/(G−1) Σ_{j≠i} R_j ] ∇log π_θ(o_i | q)                                       Eq. 9
    R_i   = r_i − β log(π_old(o_i | q) / π_ref(o_i | q))                                                  Eq. 2
    log π_θ(o_i | q) = Σ_t log π_θ(o_i,t | q, o_i,<t)       the whole answer is one action: a sum, no mean over tokens

No clip. The gradient is written as ρ·Â with ρ = π_θ/π_old, so that stale samples are weighed by their token ratio.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core import advantage
from rlkd.core.advantage import sampled_kl, with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.ports import PolicyOutput
from rlkd.core.types import Group


@dataclass(frozen=True)
class RLOO(GRPO):
    name: str = "rloo"
    norm: Norm = "sequence-sum"
    clips: ClassVar[bool] = False
    kl_in_reward: ClassVar[bool] = True

    def credit(self, group: Group) -> Group:
        rewards = group.rewards
        if self.beta:
            rewards = rewards - self.beta * np.array([sampled_kl(s).sum() for s in group.samples], np.float32)
        return with_advantages(group, advantage.leave_one_out(rewards.astype(np.float32)))

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        return -a * rho
