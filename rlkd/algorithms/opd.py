"""OPD — on-policy distillation; the baseline KD-RKL of KDRL (Xu et al. 2025, arXiv:2506.02208, Eq. 5).

    J(θ)  = − E_{o ~ π_θ} [ log π_θ(o|q) − log π_T(o|q) ] = − KL(π_θ ‖ π_T) of whole answers
    R_t   = log π_T(o_t | q, o_<t) − log π_θ(o_t | q, o_<t)           the teacher's word on each token the student wrote
    ∇J(θ) = E [ 1/Σ|o_i| Σ_i Σ_t ρ_i,t sg[A_i,t] ∇log π_θ(o_i,t) ],   A_t = R_t   or   A_t = Σ_{s≥t} R_s

A_t = R_t (the default) is the unbiased gradient of Σ_t KL(π_θ ‖ π_T) at the prefixes that were sampled: each prefix is
taken as given. The gradient of the sequence's KL also moves prefixes to where student and teacher agree, and needs the
reward to go, A_t = Σ_{s≥t} R_s (`reward_to_go`), which varies more from sample to sample; MiniLLM (Gu et al. 2024,
arXiv:2306.08543) starts from it. The verifier's reward is shown and never enters the loss; one sample is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core import kl
from rlkd.core.advantage import with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.distill import Term, no_reference
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.teachers import SCORED, Teachers, known_row, with_stream
from rlkd.core.types import Group, Origin, Signal


@dataclass(frozen=True)
class OPD(Teachers, GRPO):
    name: str = "opd"
    norm: Norm = "token"  # 1/Σ|o_i|
    standardize: bool = False
    clip: bool = False  # clip_low, clip_high and dual_clip act
    reward_to_go: bool = False  # A_t = Σ_{s≥t} R_s: the gradient of the KL of whole answers

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.TEACHER})

    def problems(self) -> list[str]:
        found = [p for p in super().problems() if not p.startswith("rollout.samples")]
        if self.rollout.samples < 1:
            found.append(f"rollout.samples={self.rollout.samples} must be at least 1")
        if self.standardize:
            found.append("standardize is of rewards, and opd has none in its loss")
        if self.dual_clip is not None and not self.clip:
            found.append("dual_clip acts with clip=true only")
        if self.mask_truncated:
            found.append(
                "mask_truncated would leave out what the teacher says of cut answers, and opd has nothing else"
            )
        return [*found, *self.teacher_problems(), *no_reference(self.name, self.beta)]

    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]:
        return np.full(len(group.samples), self.asks(group.prompt, model))

    def credit(self, group: Group) -> Group:
        """No advantage of the rewards; the teachers' log-probs as one row."""
        group = replace(group, samples=tuple(self.combined(s) for s in group.samples))
        return with_advantages(group, np.zeros(len(group.samples), np.float32))

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        return with_stream(groups, SCORED, known_row)

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        policy = x.mask(Origin.POLICY)
        teacher = x.required("teacher_logp")[0]
        here = policy & ~torch.isnan(teacher)
        delta = kl.gap(pi.logp.detach(), teacher, here)
        pull = kl.to_go(-delta, x.segment) if self.reward_to_go else -delta
        rl = super().loss(pi, replace(x, advantage=pull.float()), knobs)
        return replace(rl, metrics={**rl.metrics, **Term.of(delta).metrics(x, policy, here)})

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        return super().surrogate(rho, a, pi, x) if self.clip else -a * rho
