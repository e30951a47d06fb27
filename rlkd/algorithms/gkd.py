"""GKD — Generalized Knowledge Distillation. Agarwal et al. 2024, arXiv:2306.13649.

    L(θ) = (1−λ) E_{(q,o) ~ data} [ D(π_T ‖ π_θ)(o|q) ] + λ E_{q, o ~ π_θ} [ D(π_T ‖ π_θ)(o|q) ]               Alg. 1
    D(o|q) = 1/|o| Σ_t D(π_T(·|q, o_<t) ‖ π_θ(·|q, o_<t))                                                      Eq. 2
    D      = KL(π_T ‖ π_θ) | KL(π_θ ‖ π_T) | β KL(π_T ‖ M) + (1−β) KL(π_θ ‖ M),  M = β π_T + (1−β) π_θ         Eq. 1

The answers are sampled, and not differentiated: at each place the divergence of two known distributions is minimised,
so no estimator and no ρ is needed. λ is `rollout.on_policy`; a demonstration's tokens count like the policy's own.
Deviation: D is over the teacher's k likeliest tokens and a bucket of all others, not over the whole vocabulary; it is a
lower bound of the paper's (core/divergence.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool

from rlkd.core.advantage import with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.distill import required_topk
from rlkd.core.divergence import Divergence, of_topk, silence, topk_of
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.teachers import Teachers
from rlkd.core.types import TRAINED, Group, Signal
from rlkd.guidance import NoGuidance
from rlkd.rollout.mixed import Mixed


@dataclass(frozen=True)
class GKD(Teachers):
    name: str = "gkd"
    divergence: Divergence = "jsd"  # D
    jsd_beta: float = 0.5  # β: near 0 like forward, near 1 like reverse, but for a factor
    top_k: int = 16  # how many of the teacher's likeliest tokens
    norm: Norm = "sequence"  # 1/|o|
    norm_length: int | None = None  # the constant of norm="constant"
    rollout: Mixed = field(default_factory=Mixed)
    guidance: NoGuidance = field(default_factory=NoGuidance)
    whole_groups: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.TEACHER_TOPK})

    def problems(self) -> list[str]:
        found = self.teacher_problems()
        if self.combine in ("mean", "confidence"):
            found.append(f"combine={self.combine} is of sampled tokens; with top-k a sample has one teacher")
        if not 0 < self.jsd_beta < 1:
            found.append(f"jsd_beta={self.jsd_beta} must be between 0 and 1; its ends are divergence=forward, reverse")
        if not 0 <= self.rollout.on_policy <= 1:
            found.append(f"rollout.on_policy={self.rollout.on_policy} must be from 0 to 1")
        if self.norm == "constant" and not self.norm_length:
            found.append("norm=constant needs norm_length, e.g. sampler.max_tokens")
        for name, value in (("top_k", self.top_k), ("rollout.samples", self.rollout.samples)):
            if value < 1:
                found.append(f"{name}={value} must be at least 1")
        return found

    def knobs(self, step: int, last: Knobs) -> Knobs:
        return {}

    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]:
        return np.full(len(group.samples), self.asks(group.prompt, model))

    def credit(self, group: Group) -> Group:
        """Rewards have no part in the loss."""
        return with_advantages(required_topk(group, "gkd"), np.zeros(len(group.samples), np.float32))

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        return groups

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        ids, teacher = topk_of(x)
        trained = x.mask(TRAINED)
        here = trained & ~torch.isnan(teacher).any(-1)
        distance = of_topk(self.divergence, pi.at(ids), teacher, here, self.jsd_beta)
        metrics = {
            "divergence": x.mean(distance.detach(), TRAINED),
            "entropy": x.mean(pi.entropy.detach(), TRAINED),
            **silence(x, TRAINED, trained, here),
        }
        return Loss(x.mean(distance, TRAINED, self.norm, self.norm_length), metrics)
