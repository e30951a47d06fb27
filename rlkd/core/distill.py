"""A teacher's term at the tokens that the policy sampled: who has one, what it is, what is shown of it.

Which tokens have one is decided on the driver (numpy) and travels as the stream `distill`, w; what it is, the learner
computes (torch) from δ = log π_θ − log π_T, or from the teacher's likeliest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkd.core import kl
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.divergence import of_topk, silence, topk_of
from rlkd.core.ports import PolicyOutput
from rlkd.core.teachers import SCORED, known_row, with_stream
from rlkd.core.types import Group, Origin, Sample

DISTILL = "distill"  # stream: w, by which the term of a token is multiplied


@dataclass(frozen=True)
class Term:
    """What the teacher adds at each token; 0 where it has no say."""

    distance: Float[Tensor, "t"]  # to the loss, with gradient
    pull: Float[Tensor, "t"]  # to the advantage
    shown: Float[Tensor, "t"]  # KL in nats, for people: k3 of the sampled token (never negative), or that of the top-k
    clamped: Float[Tensor, "t"]  # 1 where |δ| was beyond the bound

    @classmethod
    def of(
        cls,
        delta: Float[Tensor, "t"],
        distance: Float[Tensor, "t"] | None = None,
        pull: Float[Tensor, "t"] | None = None,
    ) -> "Term":
        """Of the sampled tokens' δ (core.kl.gap); what is not given is 0."""
        delta = delta.detach()
        nothing = torch.zeros_like(delta)
        return cls(
            distance=nothing if distance is None else distance,
            pull=nothing if pull is None else pull,
            shown=kl.of_gap("k3", delta),
            clamped=(delta.abs() >= kl.BOUND).to(delta.dtype),
        )

    @classmethod
    def of_likeliest(cls, pi: PolicyOutput, x: MicroBatch, here: Bool[Tensor, "t"]) -> "Term":
        """The reverse KL itself, over the teacher's likeliest tokens and the tail."""
        ids, teacher = topk_of(x)
        distance = of_topk("reverse", pi.at(ids), teacher, here)
        nothing = torch.zeros_like(distance.detach())
        return cls(distance, nothing, distance.detach(), nothing)

    def metrics(
        self, x: MicroBatch, wanted: Bool[Tensor, "t"], here: Bool[Tensor, "t"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Shares of the step's: the KL over the tokens `here`, how many of those `wanted` these are, the clamped."""
        return {
            "kl_teacher": x.mean(x.streams[SCORED] * self.shown, Origin.POLICY),
            **silence(x, Origin.POLICY, wanted, here),
            "teacher_clamped": x.mean(self.clamped, Origin.POLICY),
        }


def known(x: MicroBatch, topk: bool) -> Bool[Tensor, "t"]:
    """Where the teacher's log-prob of the token, or its likeliest tokens, are known; ValueError if never scored."""
    return ~torch.isnan(topk_of(x)[1]).any(-1) if topk else ~torch.isnan(x.required("teacher_logp")[0])


# --- on the driver


def with_weight(sample: Sample, weight: float) -> Sample:
    """The sample with w at each token that the policy wrote, 0 elsewhere."""
    w = np.where(sample.origin == Origin.POLICY, weight, 0.0).astype(np.float32)
    return replace(sample, streams={**sample.streams, DISTILL: w})


def kept_tokens(sample: Sample) -> Bool[np.ndarray, "n"]:
    """The tokens with a term: w > 0 and a teacher that knows them."""
    return (sample.streams[DISTILL] > 0) & known_row(sample)


def over_kept(groups: Sequence[Group], norm: Norm) -> list[Group]:
    """w scaled so that the mean over all tokens becomes that over the kept ones; a step that keeps none has no term
    (its mean is unknown, not its absence)."""
    scaled = with_stream(groups, DISTILL, kept_tokens, norm)  # w is 0 or 1, and so part of what is kept

    def known_w(sample: Sample) -> Sample:
        w = np.nan_to_num(sample.streams[DISTILL], nan=0.0).astype(np.float32)
        return replace(sample, streams={**sample.streams, DISTILL: w})

    return [replace(g, samples=tuple(known_w(s) for s in g.samples)) for g in scaled]


def log_ratio(sample: Sample, how: Literal["sum", "mean"]) -> float:
    """The sum or mean of log π_T − log μ over the kept tokens; 0 without any."""
    assert sample.teacher_logp is not None
    kept = kept_tokens(sample)
    ratio = (sample.teacher_logp[0] - sample.behavior_logp)[kept].clip(-kl.BOUND, kl.BOUND)
    return float(ratio.sum() if how == "sum" or not kept.any() else ratio.mean())


def required_topk(group: Group, who: str) -> Group:
    """The group; ValueError if one of its samples came without a teacher's likeliest tokens."""
    if any(s.teacher_topk is None for s in group.samples):
        raise ValueError(f"{who} needs teacher_topk, but a sample came without it: was the group scored?")
    return group


def no_reference(name: str, beta: float) -> list[str]:
    """`beta` is GRPO's KL to a reference: easily taken for the teacher's, so it is refused rather than obeyed."""
    of_teacher = "; the teacher's coefficient is beta_0" if name == "kdrl" else ""
    return [f"beta={beta} would be a KL to a reference model, which {name} has not{of_teacher}"] if beta else []
