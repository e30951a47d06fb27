"""LUFFY — Learning to reason Under oFF-policY guidance. Yan et al. 2025, arXiv:2504.14945.

Of the G samples of a prompt k are worked answers τ of a teacher (tokens of origin TEACHER), the others the policy's:

    Â_i = r_i − mean(r)                                              over all G: the union, not divided by std(r)
    ℓ_t = −Â · f(π_θ(τ_t | q, τ_<t)),    f(p) = p/(p + γ)            teacher's tokens: π_φ ≡ 1, no clip
    ℓ_t = −Â · ρ_t                                                   the policy's: without PPO's clip
    L   = 1/(N·T) Σ_i Σ_t ℓ_i,t − c · mean_t H_t                     T: one constant, the longest answer allowed

The gradient on a teacher's token is Â·γp/(p + γ)²·∇log p: largest, Â/4, where p = γ, while importance sampling with
π_φ ≡ 1 would give Â·p, next to nothing where the policy has most to learn (core/shaping.py). One mean for both kinds of
tokens, over the whole optimizer step.

Deviations of the released code from the paper, and what is done here: the paper divides by a number of tokens Z, the
code by the constant T only, per micro-batch, so that its scale depends on how rows were packed; here Σ is divided by
N·T over the whole step, and `official_compat` has the released scale, packing included. The std of the group and PPO's
clip, both in the paper's GRPO, are off in the released script; here `standardize` and `clip`. Its settings
off_policy_normalize and off_policy_cliprange do nothing there and are not here.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core import shaping, surrogate
from rlkd.core.advantage import against_own, with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.shaping import Shape
from rlkd.core.types import TRAINED, Finish, Group, Origin, Sample, Signal
from rlkd.rollout import Demonstrated


@dataclass(frozen=True)
class LUFFY(GRPO):
    name: str = "luffy"
    standardize: bool = False
    norm: Norm = "constant"  # 1/(N·T); T is norm_length
    entropy: float = 0.001  # c
    clip: bool = False  # PPO's clip of the policy's own tokens, with clip_low and clip_high
    shape: Shape = "shaped"  # f
    gamma: float = 0.1  # γ
    exponent: float = 0.5  # of shape="power"
    advantage: Literal["union", "split"] = "union"  # whose mean and std: all rows', or those of the policy's own
    drop_truncated_advantage: bool = False  # Â = 0 for an answer that was cut at its limit
    sft_weight: float = 0.0  # > 0: mean negative log-likelihood of the teachers' tokens × this, instead of −Â·f
    live: bool = False  # ask the recipe's teachers for worked answers too, beside those stored with the data
    official_compat: bool = False  # the released scale Σ/T, which depends on the packing
    rollout: Demonstrated = field(default_factory=Demonstrated)
    trained: ClassVar[Origin] = TRAINED
    demonstrated: ClassVar[bool] = True  # it takes worked answers: without any the recipe is a mistake

    @property
    def needs(self) -> frozenset[Signal]:
        return super().needs | (frozenset({Signal.TEACHER_TEXT}) if self.live else frozenset())

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("gamma", "exponent"):
            if getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)} must be above 0")
        if self.sft_weight < 0:
            found.append(f"sft_weight={self.sft_weight} must not be negative")
        if self.official_compat and self.norm != "constant":
            found.append(f"official_compat is a scale of norm=constant, and norm={self.norm}")
        if self.drop_truncated_advantage and self.mask_truncated:
            found.append("drop_truncated_advantage and mask_truncated say what becomes of a cut answer: take one")
        if isinstance(self.rollout, Demonstrated):  # AMPO's is not
            found += [f"rollout.{problem}" for problem in self.rollout.problems()]
        return found

    def credit(self, group: Group) -> Group:
        """Â against all rows, or against the policy's own; the same at every token of a sample. Under `sft_weight` 1 at
        a teacher's tokens: they are learned whatever they earned."""
        if self.advantage == "union":
            credited = super().credit(group)
        else:
            own = np.array([not s.guided for s in group.samples])
            credited = with_advantages(group, against_own(group.rewards, own, self.standardize))
        return replace(credited, samples=tuple(self._changed(s) for s in credited.samples))

    def _changed(self, sample: Sample) -> Sample:
        """With the advantages that are not the rewards'."""
        assert sample.advantage is not None
        values = sample.advantage
        if self.drop_truncated_advantage and sample.finish == Finish.LENGTH:
            values = np.zeros_like(values)
        if self.sft_weight:
            values = np.where(sample.origin == Origin.TEACHER, np.float32(1.0), values)
        return replace(sample, advantage=values)

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        found = super().loss(pi, x, knobs)
        if not x.totals.tokens[int(Origin.TEACHER)]:
            return found
        p = torch.exp(pi.logp.detach())
        return replace(found, metrics={**found.metrics, "teacher_probability": x.mean(p, Origin.TEACHER)})

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        """ℓ of the policy's tokens, and of a teacher's, where ρ does not exist."""
        own = super().surrogate(rho, a, pi, x) if self.clip else -a * rho
        if not self.clip and self.dual_clip is not None:
            own = surrogate.dual_clipped(own, a, self.dual_clip)
        helped = -pi.logp if self.sft_weight else -x.advantage * shaping.shaped(
            pi.logp, self.shape, self.gamma, self.exponent
        )  # fmt: skip
        return torch.where(x.mask(Origin.TEACHER), helped, own)

    def averaged(self, per_token: Float[Tensor, "t"], x: MicroBatch) -> Float[Tensor, ""]:
        """One mean over both kinds of tokens; with `sft_weight` the teachers' have one of their own."""
        policy = Origin.POLICY if self.sft_weight else self.trained
        mean = x.mean(per_token, policy, self.norm, self.norm_length)
        if self.official_compat:
            # Released: Σ/T of the micro-batch, divided by how many micro-batches there are, as N/samples says.
            mean = mean * x.samples
        return mean + self.sft_weight * x.mean(per_token, Origin.TEACHER) if self.sft_weight else mean
