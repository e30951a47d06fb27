"""Divergences between π_θ and a teacher of whom the k likeliest tokens are known: exact over k + 1 buckets.

The bucket behind the k tokens is the *tail*, all other tokens together, with mass 1 − Σ_k. Lumping tokens together can
only make two distributions more alike, so each value is a lower bound of the divergence over the whole vocabulary, and
the larger k, the closer. Without the tail the reverse form rewards pushing mass out of the k tokens (it becomes
negative); with it, mass has nowhere to hide.

    forward   KL(q ‖ p) = Σ q (log q − log p)                                covers what the teacher does
    reverse   KL(p ‖ q) = Σ p (log p − log q)                                seeks one thing the teacher does
    jsd(β)    β KL(q ‖ m) + (1−β) KL(p ‖ m),   m = β q + (1−β) p             bounded; between the two

with q the teacher, p = π_θ. (1/β)·jsd → forward as β → 0, (1/(1−β))·jsd → reverse as β → 1. Agarwal et al. 2024,
arXiv:2306.13649, Eq. 1 and §3.1.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from rlkd.core.batch import MicroBatch
from rlkd.core.types import Origin

Divergence = Literal["forward", "reverse", "jsd"]

TAIL_FLOOR = 1e-6  # of the mass in the tail: below it 1 − Σ is rounding in float32
LOGP_FLOOR = -30.0  # of a teacher's log-prob (it may be −∞); e^−30 weighs nothing


def with_tail(logp: Float[Tensor, "t k"]) -> Float[Tensor, "t k+1"]:
    """Log-probs of the k tokens, and the log of what is left for all others (at least TAIL_FLOOR)."""
    left = (1.0 - logp.exp().sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR)
    return torch.cat([logp, left.log()], -1)


def of_topk(
    name: Divergence,
    logp: Float[Tensor, "t k"],
    teacher: Float[Tensor, "t k"],
    here: Bool[Tensor, "t"],
    beta: float = 0.5,
) -> Float[Tensor, "t"]:
    """The named divergence at each place in nats, over the teacher's k tokens and the tail; 0 where not `here`.

    `logp` is log π_θ of the teacher's k tokens, with gradient. Both may be NaN where not `here`: they are replaced
    before anything is computed, so that no NaN comes back with the gradient.
    """
    same = -math.log(2.0 * logp.shape[-1])  # any proper distribution
    p = with_tail(torch.where(here[:, None], logp, same))
    q = with_tail(torch.where(here[:, None], teacher, same).clamp(min=LOGP_FLOOR).to(p.dtype))
    return torch.where(here, between(name, p, q, beta), 0.0)


def between(
    name: Divergence, p: Float[Tensor, "*t b"], q: Float[Tensor, "*t b"], beta: float = 0.5
) -> Float[Tensor, "*t"]:
    """The named divergence of two distributions over b buckets, given as log-probs: p is π_θ, q the teacher."""
    if name == "forward":
        return (q.exp() * (q - p)).sum(-1)
    if name == "reverse":
        return (p.exp() * (p - q)).sum(-1)
    mixed = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return beta * (q.exp() * (q - mixed)).sum(-1) + (1.0 - beta) * (p.exp() * (p - mixed)).sum(-1)


def silence(
    x: MicroBatch, origin: Origin, wanted: Bool[Tensor, "t"], here: Bool[Tensor, "t"]
) -> dict[str, Float[Tensor, ""]]:
    """Of all tokens of `origin` in the step, the share with a teacher's word, and that which should have one and has
    none: its context ended, it ends with another token, it was never asked."""
    missing = wanted & x.mask(origin) & ~here
    return {
        "teacher_scored": x.mean(here.to(x.advantage.dtype), origin),
        "teacher_missing": x.mean(missing.to(x.advantage.dtype), origin),
    }


def topk_of(x: MicroBatch) -> tuple[Int32[Tensor, "t k"], Float32[Tensor, "t k"]]:
    """A teacher's likeliest tokens; ValueError if a sample came without them."""
    if x.teacher_ids is None or x.teacher_ids_logp is None:
        raise ValueError("teacher_topk is missing for at least one sample of the micro-batch: was the group scored?")
    return x.teacher_ids, x.teacher_ids_logp
