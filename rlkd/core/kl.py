"""Estimators of KL(π_θ ‖ q) from one sampled token, and what each one's *gradient* is.

With δ = log π_θ − log q at a token drawn from π_θ (Schulman's k1, k2, k3; proofs in the design notes §4.3):

    estimator  value            E[value]   gradient of its mean over samples
    k1         δ                KL         0 – as a loss it carries no signal from q at all
    k2         ½ δ²             biased     ∇KL(π_θ ‖ q), unbiased
    k3         e^−δ − 1 + δ     KL         ∇KL(q ‖ π_θ): the *forward* KL
    k3+        value of k3      KL         gradient of k2 (straight-through)

So a penalty that should pull π_θ to q in the reverse direction is k2 or k3+ in the loss, or −δ (detached) in the
advantage (`as_advantage`), which has the same expected gradient as k2.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "k3+"]


def k1(logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    return logp - other


def k2(logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    return 0.5 * (logp - other).square()


def k3(logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    delta = (logp - other).clamp(-20.0, 20.0)
    return torch.exp(-delta) - 1.0 + delta


def k3_plus(logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """Value of k3, gradient of k2."""
    surrogate = k2(logp, other)
    return surrogate + (k3(logp, other) - surrogate).detach()


def as_advantage(logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """−δ, detached: "k1 in the reward". Added to the advantage, β·(−δ) has the expected gradient of −β·KL(π_θ ‖ q)."""
    return (other - logp).detach()


def estimate(
    name: Literal["k2", "k3", "k3+"], logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"]
) -> Float[Tensor, "*t"]:
    """The named estimator as a loss term. k1 is not among them: as a loss its gradient ignores `other`."""
    return {"k2": k2, "k3": k3, "k3+": k3_plus}[name](logp, other)


# --- against a teacher that may be silent at a place, or far away

BOUND = 20.0  # |δ| beyond this is a broken or a forbidden token, not more of a pull


def gap(logp: Float[Tensor, "*t"], other: Float[Tensor, "*t"], here: Bool[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """δ = log π_θ − log q where `here` says that both are known, 0 without gradient elsewhere.

    The value is clamped to ±BOUND (log q may be −∞), its gradient is still that of log π_θ: a clamp of δ itself would
    leave a k2 loss without gradient exactly where π_θ is furthest from q. Unknown values are replaced *before* the
    subtraction, so that no NaN comes back with the gradient.
    """
    mine = torch.where(here, logp, 0.0)
    value = (mine.detach() - torch.where(here, other, 0.0)).clamp(-BOUND, BOUND)
    return value + (mine - mine.detach())


def of_gap(name: Literal["k2", "k3", "k3+"], delta: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """The named estimator of δ itself, as a loss term."""
    return estimate(name, delta, torch.zeros_like(delta))


def pull(name: Estimator, delta: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """−∂k/∂log π_θ, detached: what to add to the advantage for the gradient that −k has as an objective.

    k1 in the advantage is k2 in the loss: both are −δ. For k3 it is e^−δ − 1, the forward KL's.
    """
    delta = delta.detach()
    return torch.exp(-delta) - 1.0 if name == "k3" else -delta


def to_go(values: Float[Tensor, "t"], segment: Int64[Tensor, "t"]) -> Float[Tensor, "t"]:
    """Σ_{s≥t} values_s within each segment (ascending, as in a MicroBatch). Without gradient.

    Summed in float64 over the whole micro-batch, so that what else is in it does not show in the last digits.
    """
    suffix = torch.flip(torch.cumsum(torch.flip(values.detach().double(), (0,)), 0), (0,))
    lengths = torch.bincount(segment)
    behind = torch.cat([suffix, suffix.new_zeros(1)])[lengths.cumsum(0)]  # of the segments that follow
    return (suffix - behind[segment]).to(values.dtype)
