"""KDRL — unified Knowledge Distillation and RL. Xu et al. 2025, arXiv:2506.02208.

    J(θ)    = J_GRPO(θ) − β_s · 1/Σ_i|o_i| Σ_i Σ_t w_i k2_i,t                                               Eq. 8
    k2      = ½ δ²,  δ_i,t = log π_θ − log π_T at the sampled token: the gradient of KL(π_θ ‖ π_T) (core/kl.py)
    β_s     = max(β_0 − Δ·s, β_min)                                                               §3.3, annealing
    w_i     = 1 | 1[o_i is wrong] | 1[no o_j of the group is right]              §3.4, reward-guided distillation

Three forms. "loss" is Eq. 8. "advantage" puts the same gradient into A′_i,t = Â_i − β w_i sg[δ_i,t] with ρ before
both, so that it stays right for samples of an older policy. "reward" is the shaping the paper compares with:
r′_i = r_i − β w_i Σ_t δ_i,t, normalised in the group, which mixes the KL into the baseline and rescales β by std(r′).

There is no official code. Where re-implementations differ from the paper: AReaL differentiates δ itself (k1 as a loss),
whose expected gradient does not depend on the teacher, and is refused here; the denominator of the masked KD term is
all tokens of the step or the kept ones (`denominator`). The paper is strictly on-policy and has no clip, nor has this
unless `clip`. Groups without contrast are kept: Â is 0 there, and KD acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core import advantage, kl
from rlkd.core.advantage import with_advantages
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.divergence import of_topk, silence, topk_of
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.teachers import SCORED, Teachers, known_row, with_stream
from rlkd.core.types import Group, Origin, Sample, Signal

DISTILL = "distill"  # stream: w, by which the KD term of a token is multiplied


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
        found = [*super().problems(), *self.teacher_problems(), *no_reference(self.name, self.beta)]
        found += [f"{n}={getattr(self, n)} must not be negative" for n in BETAS if getattr(self, n) < 0]
        if self.beta_decay and self.beta_min > self.beta_0:
            found.append(f"beta_min={self.beta_min} is above beta_0={self.beta_0}: β would rise at once")
        if self.dual_clip is not None and not self.clip:
            found.append("dual_clip acts with clip=true only")
        if self.mask_truncated:
            found.append("mask_truncated would leave out what the teacher says of cut answers; they keep their KD term")
        return found + self._estimator_problems() + self._reward_problems()

    def _estimator_problems(self) -> list[str]:
        if self.kl == "k1" and self.form == "loss":
            return [
                "kl=k1 with form=loss learns nothing of the teacher: the gradient of log π_θ − log π_T does not depend "
                "on π_T, and is 0 in expectation; take kl=k2, or form=advantage, where k1 is right"
            ]
        if self.kl != "topk":
            return []
        found = []
        if self.form != "loss":
            found.append(f"kl=topk is a loss over many tokens and needs form=loss, not form={self.form}")
        if self.combine in ("mean", "confidence"):
            found.append(f"combine={self.combine} is of sampled tokens; with kl=topk a sample has one teacher")
        if self.top_k < 1:
            found.append(f"top_k={self.top_k} must be at least 1")
        return found

    def _reward_problems(self) -> list[str]:
        if self.form != "reward":
            return []
        found = []
        if self.beta_decay:
            found.append("beta_decay must be 0 with form=reward: a reward is shaped before its step is known")
        if self.kl in ("k3", "k3+"):
            found.append(f"kl={self.kl} has no meaning with form=reward, where δ itself is the reward: kl=k1 or k2")
        if self.denominator != "all":
            found.append("denominator=kept is of a KD term in the loss; form=reward has none")
        return found

    def knobs(self, step: int, last: Knobs) -> Knobs:
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
        taught = [self._taught(s, w) for s, w in zip(group.samples, self.weights(group), strict=True)]
        group = replace(group, samples=tuple(taught))
        return self._shaped(group) if self.form == "reward" else super().credit(group)

    def _taught(self, sample: Sample, weight: np.float32) -> Sample:
        if self.kl != "topk":
            sample = self.combined(sample)
        elif sample.teacher_topk is None:
            raise ValueError("kl=topk needs teacher_topk, but a sample came without it: was the group scored?")
        w = np.where(sample.origin == Origin.POLICY, weight, 0.0).astype(np.float32)
        return replace(sample, streams={**sample.streams, DISTILL: w})

    def _shaped(self, group: Group) -> Group:
        """Â of r′; the rewards themselves stay what the verifiers said, and β w R is among the scores."""
        bonus = np.array([self.beta_0 * self._ratio(s) for s in group.samples], np.float32)
        scale = advantage.standardized if self.standardize else advantage.centered
        scored = [
            replace(s, scores={**s.scores, "teacher": float(b)}) for s, b in zip(group.samples, bonus, strict=True)
        ]
        return with_advantages(replace(group, samples=tuple(scored)), scale(group.rewards + bonus))

    def _ratio(self, sample: Sample) -> float:
        """w Σ or mean of log π_T − log μ over the tokens that the teacher scored."""
        assert sample.teacher_logp is not None
        kept = kept_tokens(sample)
        ratio = (sample.teacher_logp[0] - sample.behavior_logp)[kept].clip(-kl.BOUND, kl.BOUND)
        return float(ratio.sum() if self.shaping == "sum" or not kept.any() else ratio.mean())

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The denominators of the kept tokens, which only the whole step knows."""
        if not self.beta_0:
            return groups
        groups = with_stream(groups, SCORED, kept_tokens)
        if self.denominator == "all":
            return groups
        scaled = with_stream(groups, DISTILL, kept_tokens, self.norm)  # w is 0 or 1, and so part of what is kept
        return [replace(g, samples=tuple(_zero_if_none(s) for s in g.samples)) for g in scaled]

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        if not self.beta_0:
            return super().loss(pi, x, knobs)
        beta, w = knobs["beta"], x.streams[DISTILL]
        here = x.mask(Origin.POLICY) & (w > 0) & self._known(x)
        term = self._of_topk(pi, x, here) if self.kl == "topk" else self._of_sampled(pi, x, here)
        x = replace(x, advantage=(x.advantage + beta * w * term.pull).float())
        rl = super().loss(pi, x, knobs)
        distance = x.mean(w * term.distance, Origin.POLICY, self.norm, self.norm_length)
        metrics = {
            "kl_teacher": x.mean(x.streams[SCORED] * term.shown, Origin.POLICY),
            **silence(x, Origin.POLICY, w > 0, here),
            "teacher_clamped": x.mean(term.clamped, Origin.POLICY),
        }
        return replace(rl, value=rl.value + beta * distance, metrics={**rl.metrics, **metrics})

    def _known(self, x: MicroBatch) -> Bool[Tensor, "t"]:
        if self.kl != "topk":
            return ~torch.isnan(x.required("teacher_logp")[0])
        return ~torch.isnan(topk_of(x)[1]).any(-1)

    def _of_sampled(self, pi: PolicyOutput, x: MicroBatch, here: Bool[Tensor, "t"]) -> "Term":
        """From the sampled token alone: in the advantage, in the loss, or (form=reward) in neither."""
        delta = kl.gap(pi.logp, x.required("teacher_logp")[0], here)
        pull = distance = torch.zeros_like(delta.detach())
        if self.form == "advantage" and self.kl != "topk":
            pull = kl.pull(self.kl, delta)
        if self.form == "loss" and self.kl in ("k2", "k3", "k3+"):
            distance = kl.of_gap(self.kl, delta) * self.importance(pi, x)
        clamped = (delta.detach().abs() >= kl.BOUND).to(delta.dtype)
        return Term(distance, pull, kl.of_gap("k3", delta.detach()), clamped)

    def _of_topk(self, pi: PolicyOutput, x: MicroBatch, here: Bool[Tensor, "t"]) -> "Term":
        """The reverse KL itself, over the teacher's likeliest tokens and the tail."""
        ids, teacher = topk_of(x)
        distance = of_topk("reverse", pi.at(ids), teacher, here)
        nothing = torch.zeros_like(distance.detach())
        return Term(distance, nothing, distance.detach(), nothing)

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        return super().surrogate(rho, a, pi, x) if self.clip else -a * rho


@dataclass(frozen=True)
class Term:
    """What the teacher adds at each token; 0 where it has no say."""

    distance: Float[Tensor, "t"]  # to the loss, with gradient
    pull: Float[Tensor, "t"]  # to the advantage
    shown: Float[Tensor, "t"]  # KL in nats, for people: k3 of the sampled token (never negative), or that of the top-k
    clamped: Float[Tensor, "t"]  # 1 where |δ| was beyond the bound


BETAS = ("beta_0", "beta_min", "beta_decay")


def no_reference(name: str, beta: float) -> list[str]:
    """`beta` is GRPO's KL to a reference: easily taken for the teacher's, so it is refused rather than obeyed."""
    of_teacher = "; the teacher's coefficient is beta_0" if name == "kdrl" else ""
    return [f"beta={beta} would be a KL to a reference model, which {name} has not{of_teacher}"] if beta else []


def kept_tokens(sample: Sample) -> Bool[np.ndarray, "n"]:
    """The tokens with a KD term: w > 0 and a teacher that knows them."""
    return (sample.streams[DISTILL] > 0) & known_row(sample)


def _zero_if_none(sample: Sample) -> Sample:
    """A step in which nothing is kept has no KD term (its mean is unknown, not its absence)."""
    w = sample.streams[DISTILL]
    return replace(sample, streams={**sample.streams, DISTILL: np.nan_to_num(w, nan=0.0).astype(np.float32)})
