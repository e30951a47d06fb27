"""Dr. GRPO — GRPO Done Right. Liu et al. 2025, arXiv:2503.20783.

    Â_i  = r_i − mean(r)                                            no division by std(r): no bias by difficulty
    J(θ) = 1/(N·L) Σ_i Σ_t min(ρ Â_i, clip(ρ, 1±ε) Â_i)             no 1/|o_i|: no bias to long wrong answers

L is one constant for the whole run (`norm_length`, the longest answer allowed). The released code divides by L per
micro-batch; here the mean is over the step's N samples.
"""

from dataclasses import dataclass

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import Norm


@dataclass(frozen=True)
class DrGRPO(GRPO):
    name: str = "dr_grpo"
    standardize: bool = False
    norm: Norm = "constant"
