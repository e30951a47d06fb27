"""Advantage-Aware Shaping: how ThinkTuning weighs a token that a teacher wrote. Pure; torch.

    γ(A) = γ_min + (γ_max − γ_min)·(A_max − A)/(A_max − A_min),   clamped
    d    = sg[p] + γ(A);   sg[p]/1.0001 where d ≤ 0,   sg[p]/0.9999 where d > 1
    w    = p/d;   1 where A < 0 and p < .01     the loss of the token is −A·w, its gradient −A·w·∇log π

The exception is the ordinary policy term −A·ρ: nobody sampled the token, so that ρ = π/sg[π], and no clip ever acts.

With γ_min = .001 > γ_max = −.001 a good row weighs slightly less than 1, a bad one slightly more. The released code
clamps γ between γ_min *below* and γ_max *above*; PyTorch then returns the upper bound everywhere, so there γ ≡ γ_max
and w = p/(p − .001) ≥ 1, which diverges as p → .001 from above. `released` reproduces that; the default clamps between
the smaller and the larger of the two.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AAS:
    gamma_min: float = 0.001  # γ at A_max
    gamma_max: float = -0.001  # γ at A_min
    advantage_min: float = -4.0  # A_min
    advantage_max: float = 4.0  # A_max
    rare: float = 0.01  # where A < 0 and p is below, the token keeps its ordinary policy term

    def problems(self) -> list[str]:
        found = []
        if self.advantage_min >= self.advantage_max:
            found.append(f"advantage_min={self.advantage_min} must be below advantage_max={self.advantage_max}")
        if not 0 <= self.rare <= 1:
            found.append(f"rare={self.rare} must be a probability")
        return found

    def gamma(self, advantage: Float[Tensor, "*t"], released: bool = False) -> Float[Tensor, "*t"]:
        """γ(A) after the clamp."""
        fall = (self.advantage_max - advantage) / (self.advantage_max - self.advantage_min)
        gamma = self.gamma_min + (self.gamma_max - self.gamma_min) * fall
        if released:
            return gamma.clamp(self.gamma_min, self.gamma_max)
        return gamma.clamp(min(self.gamma_min, self.gamma_max), max(self.gamma_min, self.gamma_max))

    def weight(
        self, logp: Float[Tensor, "*t"], advantage: Float[Tensor, "*t"], released: bool = False
    ) -> Float[Tensor, "*t"]:
        """w, with the gradient w·∇log π. Written as sg[w]·π/sg[π], so that p = 0 and d = 0 make no NaN."""
        p = torch.exp(logp.detach())
        d = p + self.gamma(advantage, released)
        divisor = torch.where(d > 0, d, torch.ones_like(d))
        value = torch.where(d > 0, torch.where(d > 1, torch.full_like(d, 0.9999), p / divisor), 1.0001)
        value = torch.where((advantage < 0) & (p < self.rare), 1.0, value)
        return value * torch.exp(logp - logp.detach())
