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
from jaxtyping import Float
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
