"""Rejection-sampling SFT — the policy imitates its own right answers. RAFT: Dong et al. 2023, arXiv:2304.06767; RFT:
Yuan et al. 2023, arXiv:2308.01825.

    D    = { o_i ~ π_θ(· | q), i = 1…G : r_i > success }
    L(θ) = −1/M Σ_{o ∈ D} Σ_t log π_θ(o_t | q, o_<t)

A prompt's group without a right answer is turned away. RAFT keeps the best answer of each prompt (`keep: one`; with
rewards of 0 and 1 all right ones are best, and the prompt's seed draws one); RFT keeps all right ones of a first model,
where here they are drawn anew from the current policy. An answer that was cut at its limit is not kept, right or not:
its end was never written, and imitating it would teach not to end.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from rlkd.algorithms.sft import Imitation
from rlkd.core.types import Finish, Group, Origin
from rlkd.rollout import Sampled


@dataclass(frozen=True)
class RSFT(Imitation):
    name: str = "rsft"
    keep: Literal["all", "one"] = "all"
    success: float = 0.5  # a reward above this is right
    rollout: Sampled = field(default_factory=Sampled)
    trained: ClassVar[Origin] = Origin.POLICY

    def problems(self) -> list[str]:
        few = self.rollout.samples < 1
        return [f"rollout.samples={self.rollout.samples} must be at least 1"] if few else []

    def credit(self, group: Group) -> Group:
        """The right answers, or one of the best of them; none: turned away."""
        right = [s for s in group.samples if s.reward > self.success and s.finish == Finish.STOP]
        if self.keep == "one" and right:
            best = max(s.reward for s in right)
            right = [s for s in right if s.reward == best]
            right = [right[np.random.default_rng(group.prompt.seed).integers(len(right))]]
        return replace(group, samples=tuple(right))
