"""GSPO — Group Sequence Policy Optimization. Zheng et al. 2025, arXiv:2507.18071.

    s_i(θ)   = (π_θ(o_i|q) / π_old(o_i|q))^(1/|o_i|) = exp(1/|o_i| Σ_t log ρ_i,t)                        Eq. 7
    s_i,t(θ) = sg[s_i(θ)] · π_θ(o_i,t) / sg[π_θ(o_i,t)]                     GSPO-token, Eq. 14; same gradient as s_i
    J(θ)     = E [ 1/G Σ_i 1/|o_i| Σ_t min(s_i,t Â_i, clip(s_i,t, 1−ε_low, 1+ε_high) Â_i) ]              Eq. 13

log s_i is clamped at 10 from above, as in released code, against overflow.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import MicroBatch
from rlkd.core.ports import PolicyOutput
from rlkd.core.types import Origin


@dataclass(frozen=True)
class GSPO(GRPO):
    name: str = "gspo"
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        log_s = x.spread(x.per_sequence(torch.log(rho.detach()), Origin.POLICY)).clamp(max=10.0)
        straight = pi.logp - pi.logp.detach()  # 0, with the gradient of log π_θ
        return super().surrogate(torch.exp(log_s + straight), a, pi, x)
