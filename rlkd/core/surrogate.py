"""Per-token surrogate losses. Signs: these are losses (to be minimised), advantages are to be maximised."""

import torch
from jaxtyping import Float
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # |log ρ| beyond this is a broken log-prob, not information; keeps exp finite


def ratio(logp: Float[Tensor, "*t"], old_logp: Float[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """ρ = π_θ/π_old. Where `old_logp` is NaN (nobody sampled the token) ρ is 1 with the gradient of log π_θ.

    NaN must be replaced *before* the subtraction: masking afterwards leaves NaN in the gradient.
    """
    old = torch.where(torch.isnan(old_logp), logp.detach(), old_logp)
    return torch.exp((logp - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def clipped(rho: Float[Tensor, "*t"], advantage: Float[Tensor, "*t"], low: float, high: float) -> Float[Tensor, "*t"]:
    """max(−Aρ, −A·clip(ρ, 1−low, 1+high)): PPO's clip, asymmetric as in DAPO when high > low."""
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1.0 - low, 1.0 + high))


def dual_clipped(loss: Float[Tensor, "*t"], advantage: Float[Tensor, "*t"], bound: float) -> Float[Tensor, "*t"]:
    """Where A < 0, the loss is at most −A·bound (bound > 1). Ye et al. 2019, arXiv:1912.09729."""
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * bound), loss)
