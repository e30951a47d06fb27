"""KDRL — unified Knowledge Distillation and RL. Xu et al. 2025, arXiv:2506.02208.

    J(θ)    = J_GRPO(θ) − β_s · 1/Σ_i|o_i| Σ_i Σ_t w_i k2_i,t                                               Eq. 8
    k2      = ½ δ²,  δ_i,t = log π_θ − log π_T at the sampled token: the gradient of KL(π_θ ‖ π_T) (core/kl.py)
    β_s     = max(β_0 − Δ·s, β_min)                                                               §3.3, annealing
    w_i     = 1 | 1[o_i is wrong] | 1[no o_j of the group is right]              §3.4, reward-guided distillation

Three forms, one `Term` of the teacher's. "loss" is Eq. 8, its tokens weighed by sg[ρ] as the KL of GRPO is. "advantage"
puts the same gradient into A′_i,t = Â_i − β w_i sg[δ_i,t], with ρ before both. "reward" is the shaping the paper
compares with: r′_i = r_i − β w_i Σ_t δ_i,t, normalised in the group, which mixes the KL into the baseline and rescales
β by std(r′).

There is no official code. Where re-implementations differ from the paper: AReaL differentiates δ itself (k1 as a loss),
whose expected gradient does not depend on the teacher, and is refused here; the denominator of the masked KD term is
all tokens of the step or the kept ones (`denominator`). The paper is strictly on-policy and has no clip, nor has this
unless `clip`. Groups without contrast are kept: Â is 0 there, and KD acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core import kl
from rlkd.core.advantage import with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.distill import (
    DISTILL,
    Term,
    kept_tokens,
    known,
    log_ratio,
    no_reference,
    over_kept,
    required_topk,
    with_weight,
)
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.teachers import SCORED, Teachers, with_stream
from rlkd.core.types import Group, Origin, Signal

BETAS = ("beta_0", "beta_min", "beta_decay")


@dataclass(frozen=True)
class KDRL(Teachers, GRPO):
    name: str = "kdrl"
    norm: Norm = "token"  # 1/Σ|o_i|
    clip: bool = False  # clip_low, clip_high and dual_clip act
    form: Literal["advantage", "loss", "reward"] = "advantage"
    kl: Literal["k1", "k2", "k3", "k3+", "topk"] = "k2"  # type: ignore[assignment]  # of the teacher's KL
    top_k: int = 16  # type: ignore[misc]  # of kl=topk: how many of the teacher's likeliest tokens
    beta_0: float = 5e-3  # β at the first step; 0 asks for no teacher
    beta_min: float = 1e-3
    beta_decay: float = 5e-5  # Δ, a step; 0: β is β_0 throughout
    distill: Literal["all", "wrong", "failed_group"] = "all"  # w
    success: float = 0.5  # a sample is right if its reward is above this
    denominator: Literal["all", "kept"] = "all"  # of the KD term: the step's tokens, or those with w = 1 and a teacher
    shaping: Literal["sum", "mean"] = "sum"  # of form=reward: over a sample's tokens

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.TEACHER_TOPK if self.kl == "topk" else Signal.TEACHER} if self.beta_0 else ())

    def problems(self) -> list[str]:
        topk, reward = self.kl == "topk", self.form == "reward"
        rules = [
            (self.beta_decay and self.beta_min > self.beta_0,
             f"beta_min={self.beta_min} is above beta_0={self.beta_0}: β would rise at once"),
            (self.dual_clip is not None and not self.clip, "dual_clip acts with clip=true only"),
            (self.mask_truncated,
             "mask_truncated would leave out what the teacher says of cut answers; they keep their KD term"),
            (self.kl == "k1" and self.form == "loss",
             "kl=k1 with form=loss learns nothing of the teacher: the gradient of log π_θ − log π_T does not depend on "
             "π_T, and is 0 in expectation; take kl=k2, or form=advantage, where k1 is right"),
            (topk and self.form != "loss",
             f"kl=topk is a loss over many tokens and needs form=loss, not form={self.form}"),
            (topk and self.combine in ("mean", "confidence"),
             f"combine={self.combine} is of sampled tokens; with kl=topk a sample has one teacher"),
            (topk and self.top_k < 1, f"top_k={self.top_k} must be at least 1"),
            (reward and self.beta_decay,
             "beta_decay must be 0 with form=reward: a reward is shaped before its step is known"),
            (reward and self.kl in ("k3", "k3+"),
             f"kl={self.kl} has no meaning with form=reward, where δ itself is the reward: kl=k1 or k2"),
            (reward and self.denominator != "all",
             "denominator=kept is of a KD term in the loss; form=reward has none"),
        ]  # fmt: skip
        negative = [f"{n}={getattr(self, n)} must not be negative" for n in BETAS if getattr(self, n) < 0]
        found = [*super().problems(), *self.teacher_problems(), *no_reference(self.name, self.beta), *negative]
        return found + [said for broken, said in rules if broken]

    def knobs(self, step: int, last: Knobs) -> Knobs:
        """β_s."""
        if not self.beta_decay:
            return {"beta": self.beta_0}
        return {"beta": max(self.beta_0 - self.beta_decay * step, self.beta_min)}

    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]:
        """Nobody scores a sample whose w is 0, nor for a teacher that is not asked about this prompt."""
        return (self.weights(group) > 0) & self.asks(group.prompt, model)

    def weights(self, group: Group) -> Float32[np.ndarray, "g"]:
        """w, by the rewards as they came from the verifiers."""
        right = group.rewards > self.success
        kept = {"all": np.ones_like(right), "wrong": ~right, "failed_group": np.full_like(right, not right.any())}
        return kept[self.distill].astype(np.float32)

    def credit(self, group: Group) -> Group:
        """Â as in GRPO, w as a stream, and the teachers' log-probs as one row."""
        if not self.beta_0:
            return super().credit(group)
        if self.kl == "topk":
            scored = required_topk(group, "kl=topk").samples
        else:
            scored = tuple(self.combined(s) for s in group.samples)
        group = replace(group, samples=tuple(map(with_weight, scored, self.weights(group).tolist())))
        return self.shaped(group) if self.form == "reward" else super().credit(group)

    def shaped(self, group: Group) -> Group:
        """Â of r′; the rewards themselves stay what the verifiers said, and β w R is among the scores."""
        bonus = self.beta_0 * np.array([log_ratio(s, self.shaping) for s in group.samples], np.float32)
        samples = [
            replace(s, scores={**s.scores, "teacher": float(b)}) for s, b in zip(group.samples, bonus, strict=True)
        ]
        return with_advantages(replace(group, samples=tuple(samples)), self.compared(group.rewards + bonus))

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The denominators of the kept tokens, which only the whole step knows."""
        if not self.beta_0:
            return groups
        groups = with_stream(groups, SCORED, kept_tokens)
        return groups if self.denominator == "all" else over_kept(groups, self.norm)

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        if not self.beta_0:
            return super().loss(pi, x, knobs)
        beta, w = knobs["beta"], x.streams[DISTILL]
        here = x.mask(Origin.POLICY) & (w > 0) & known(x, self.kl == "topk")
        term = self.term(pi, x, here)
        rl = super().loss(pi, replace(x, advantage=(x.advantage + beta * w * term.pull).float()), knobs)
        distance = x.mean(w * term.distance, Origin.POLICY, self.norm, self.norm_length)
        return replace(rl, value=rl.value + beta * distance, metrics={**rl.metrics, **term.metrics(x, w > 0, here)})

    def term(self, pi: PolicyOutput, x: MicroBatch, here: Bool[Tensor, "t"]) -> Term:
        """The teacher's word on the tokens `here`: in the loss, in the advantage, or (form=reward) in neither."""
        if self.kl == "topk":
            return Term.of_likeliest(pi, x, here)
        delta = kl.gap(pi.logp, x.required("teacher_logp")[0], here)
        if self.form == "advantage":
            return Term.of(delta, pull=kl.pull(self.kl, delta))
        if self.form == "loss" and self.kl != "k1":
            return Term.of(delta, distance=kl.of_gap(self.kl, delta) * self.importance(pi, x))
        return Term.of(delta)

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        return super().surrogate(rho, a, pi, x) if self.clip else -a * rho
