"""AMPO — Adaptive Multi-guidance Policy Optimization. Yuan et al. 2025, arXiv:2510.02227. LUFFY's loss, help on demand.

    inject for a prompt      ⇔  none of its G answers is right (r > 0.6)                       guidance on demand
    κ_j = 0.9·s_j + 0.1·fmt_j,  s_j = mean_{t∈Ω} π_θ(y*_t | q, τ_j, y*_<t)                      comprehension
    the min(m, k) traces τ_j with the largest κ_j replace as many wrong answers                selection
    Â_i = r_i − mean(r)                                                                        over the mixed group
    ℓ_t = −Â · p/(p + γ) on a trace's tokens;  PPO's clip ε = 0.2, dual clip c = 10 on the policy's
    L   = 1/(N·T) Σ ℓ − c_H · mean H

The reward r = 0.9·right + 0.1·form − 1[repeats itself], the last only where the rest is not 0, is the recipe's:
`rewards: {math: {weight: 0.9}, format: {weight: 0.1}, repetition: {}}`.

Deviations of the released code from the paper, and what is done here: an injected row gets the reward 1 whatever the
verifier says of it; here a wrong trace is not injected (guidance/replace.py), unless `official_compat`. The scale of
its loss depends on the packing, as LUFFY's does (algorithms/luffy.py). A prompt without traces ends it with an error;
here its group stays as it is. A pool of more than four is cut in one place and not in another; here in one place.
"""

from dataclasses import dataclass, field, replace

from rlkd.algorithms.luffy import LUFFY
from rlkd.guidance.replace import Replacement
from rlkd.rollout import Sampled


@dataclass(frozen=True)
class AMPO(LUFFY):
    name: str = "ampo"
    clip: bool = True
    dual_clip: float | None = 10.0  # c
    rollout: Sampled = field(default_factory=Sampled)  # type: ignore[assignment]  # nobody helps before it is needed
    guidance: Replacement = field(default_factory=Replacement)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.official_compat:  # one switch for both halves
            object.__setattr__(self, "guidance", replace(self.guidance, official_compat=True))

    def problems(self) -> list[str]:
        found = super().problems() + self.guidance.problems()
        if self.advantage == "split" and self.standardize:
            found.append("advantage=split with standardize divides by the deviation of rows that all failed: take one")
        return found
