"""CISPO — Clipped IS-weight Policy Optimization. MiniMax-M1, 2025, arXiv:2506.13585.

    J(θ) = 1/Σ|o_i| Σ_i Σ_t sg[clip(ρ_i,t, 1−ε_low, 1+ε_high)] Â_i log π_θ(o_i,t)                          Eq. 4, 5

The weight is clipped, not the update: every token keeps a gradient. The paper clips from above only (ε_low large);
implementations differ in what ε means: here both are distances from 1, so a weight of at most 5 is clip_high=4.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.ports import PolicyOutput


@dataclass(frozen=True)
class CISPO(GRPO):
    name: str = "cispo"
    norm: Norm = "token"
    clip_low: float = 1.0  # never from below
    clip_high: float = 4.0
    clips: ClassVar[bool] = False

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        return -rho.detach().clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * a * pi.logp
