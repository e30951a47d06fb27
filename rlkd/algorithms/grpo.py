"""GRPO — Group Relative Policy Optimization. Shao et al. 2024, arXiv:2402.03300.

    Â_i,t = (r_i − mean(r)) / std(r)                                                            §4.1.2
    J(θ)  = E [ 1/G Σ_i 1/|o_i| Σ_t min(ρ_i,t Â_i,t, clip(ρ_i,t, 1−ε, 1+ε) Â_i,t) − β KL(π_θ ‖ π_ref) ]    Eq. 3
    ρ_i,t = π_θ(o_i,t | q, o_i,<t) / π_old(o_i,t | q, o_i,<t)
    KL    ≈ k3 = π_ref/π_θ − log(π_ref/π_θ) − 1                                                  Eq. 4

π_old is what sampled: its log-probs come with the tokens, so a strictly on-policy step needs no second pass. Where
sampler (vLLM, μ) and learner compute different numbers for the same weights, `correction` makes π_old = sg[π_θ] and
weighs each token (or sample) by w = π_old/μ, truncated (TIS) or masked outside [low, cap] (MIS/IcePop):

    ℓ_i,t = w_i,t · max(−ρ Â, −clip(ρ) Â),    w = min(π_old/μ, C)   or   w·1[C_low ≤ w ≤ C]

`reject` leaves out tokens or samples whose mismatch is too large, `mask_truncated` answers that were cut at their
limit: w = 0. They still count in the denominators (core/mismatch.py has these settings and equations).

The KL is an expectation over π_θ and the tokens are μ's: its term is weighted by sg[ρ]·w. With sg the expected gradient
is that of the same estimator on-policy; ρ's own gradient would make it another (k3's the reverse KL's, k2's none's).

Deviation: the paper's k3 in the loss has the gradient of the *forward* KL (core/kl.py); `kl` can choose k2 or k3+
(reverse), or k1, which is then put into the advantage, where it has a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlkd.core import advantage, kl, surrogate
from rlkd.core.advantage import with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.kl import Estimator
from rlkd.core.mismatch import Weighted
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.types import Group, Origin, Signal
from rlkd.guidance import NoGuidance
from rlkd.rollout import Sampled


@dataclass(frozen=True)
class GRPO(Weighted):
    name: str = "grpo"
    clip_low: float = 0.2  # ε
    clip_high: float = 0.2
    dual_clip: float | None = None  # c > 1: where Â < 0 the loss is at most c|Â|
    standardize: bool = True  # divide by std(r)
    norm: Norm = "sequence"  # 1/|o_i|
    norm_length: int | None = None  # the constant of norm="constant"
    beta: float = 0.0  # β; 0 asks for no reference model
    kl: Estimator = "k3"
    entropy: float = 0.0  # coefficient of an entropy bonus
    rollout: Sampled = field(default_factory=Sampled)
    guidance: NoGuidance = field(default_factory=NoGuidance)
    whole_groups: ClassVar[bool] = False
    top_k: ClassVar[int] = 0
    trained: ClassVar[Origin] = Origin.POLICY  # whose tokens ℓ is a mean over
    clips: ClassVar[bool] = True  # whether `surrogate` has PPO's clip, and with it the dual one
    kl_in_reward: ClassVar[bool] = False  # whether `credit` charges β·KL (RLOO, REINFORCE++) instead of the loss

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.REFERENCE} if self.beta else ())

    def problems(self) -> list[str]:
        """What is contradictory in this configuration, one sentence each."""
        found = []
        if self.norm == "constant" and not self.norm_length:
            found.append("norm=constant needs norm_length, e.g. sampler.max_tokens")
        if self.dual_clip is not None and self.dual_clip <= 1:
            found.append(f"dual_clip={self.dual_clip} must be > 1")
        if self.dual_clip is not None and not self.clips:
            found.append(f"dual_clip={self.dual_clip} has no part in {self.name}'s loss")
        for field_name in ("beta", "clip_low", "clip_high"):
            if getattr(self, field_name) < 0:
                found.append(f"{field_name}={getattr(self, field_name)} must not be negative")
        if self.rollout.samples < 2:
            found.append(f"rollout.samples={self.rollout.samples}: an advantage against the group needs at least 2")
        return found + self.weight_problems()

    def knobs(self, step: int, last: Knobs) -> Knobs:
        return {}

    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]:
        return np.ones(len(group.samples), bool)

    def credit(self, group: Group) -> Group:
        """Â: the group's rewards against their mean, the same at every token of a sample."""
        return with_advantages(group, self.compared(group.rewards))

    def compared(self, rewards: Float32[np.ndarray, "g"]) -> Float32[np.ndarray, "g"]:
        return (advantage.standardized if self.standardize else advantage.centered)(rewards)

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        return groups

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        weight, rho = self.weight(pi.logp, x), self.ratio(pi, x)
        loss = self.averaged(self.surrogate(rho, self.penalised(pi, x), pi, x) * weight, x)
        outside = (rho < 1 - self.clip_low) | (rho > 1 + self.clip_high)
        metrics = {
            "ratio": x.mean(rho.detach(), Origin.POLICY),
            "outside_clip": x.mean(outside.to(rho.dtype), Origin.POLICY),
            "entropy": x.mean(pi.entropy.detach(), Origin.POLICY),
            **self.weight_metrics(pi.logp, x),
        }
        if self.entropy:
            loss = loss - self.entropy * x.mean(pi.entropy, self.trained)
        if self.beta:
            reference = x.required("reference_logp")
            metrics["kl_reference"] = x.mean(kl.k3(pi.logp.detach(), reference), Origin.POLICY)
            if self.kl != "k1" and not self.kl_in_reward:
                penalty = kl.estimate(self.kl, pi.logp, reference) * self.importance(pi, x)
                loss = loss + self.beta * x.mean(penalty, Origin.POLICY, self.norm, self.norm_length)
        return Loss(loss, metrics)

    def ratio(self, pi: PolicyOutput, x: MicroBatch) -> Float[Tensor, "t"]:
        """ρ against π_old: what sampled, or with a correction π_θ itself."""
        return surrogate.ratio(pi.logp, x.behavior_logp if self.correction == "none" else pi.logp.detach())

    def importance(self, pi: PolicyOutput, x: MicroBatch) -> Float[Tensor, "t"]:
        """sg[ρ]·w: what makes a mean over the sampled tokens one over π_θ's."""
        return self.ratio(pi, x).detach() * self.weight(pi.logp, x)

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        """ℓ per token; what GSPO, CISPO and their like replace."""
        loss = surrogate.clipped(rho, a, self.clip_low, self.clip_high)
        return loss if self.dual_clip is None else surrogate.dual_clipped(loss, a, self.dual_clip)

    def averaged(self, per_token: Float[Tensor, "t"], x: MicroBatch) -> Float[Tensor, ""]:
        """This micro-batch's share of the step's mean of ℓ."""
        return x.mean(per_token, self.trained, self.norm, self.norm_length)

    def penalised(self, pi: PolicyOutput, x: MicroBatch) -> Float[Tensor, "t"]:
        """Â, with −β·k1 against the reference if that is the chosen estimator."""
        if self.beta and self.kl == "k1" and not self.kl_in_reward:
            return x.advantage + self.beta * kl.as_advantage(pi.logp, x.required("reference_logp"))
        return x.advantage
