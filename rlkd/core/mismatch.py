"""What a token weighs in a policy-gradient loss: by how far learner and sampler are apart, and whose it is. Torch.

With ℓ_t = log π_θ − log μ at a token that the policy sampled (a kernel's rounding, or an older policy's weights):

    tis      w = min(e^ℓ, C)                     truncated importance sampling; of a sample: Σ_t ℓ_t instead of ℓ_t
    mis      w = e^ℓ · 1[C_low ≤ e^ℓ ≤ C]        masked (IcePop)
    reject   w · 1[statistic ≤ above]            `Reject`: the token, or its whole sample, is left out
    mask     w · 1[the sample has an end]        answers that were cut at their limit are left out

What is left out still counts in the denominators of the step's means, so that the others weigh what they weigh without.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlkd.core.batch import MicroBatch
from rlkd.core.surrogate import LOG_RATIO_BOUND
from rlkd.core.types import Origin


def log_ratio(logp: Float[Tensor, "t"], x: MicroBatch) -> Float[Tensor, "t"]:
    """ℓ at the tokens that the policy sampled, 0 elsewhere; within ±20, so that exp is finite (NaN stays NaN)."""
    gap = (logp.detach() - x.behavior_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.where(x.mask(Origin.POLICY), gap, 0.0)


def of_sample(log_ratio: Float[Tensor, "t"], x: MicroBatch) -> Float[Tensor, "t"]:
    """Σ_t ℓ_t of its sample at each token, within the same bounds."""
    return x.spread(x.per_sequence(log_ratio, Origin.POLICY, "sum")).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def truncated(log_ratio: Float[Tensor, "*t"], cap: float) -> Float[Tensor, "*t"]:
    return torch.exp(log_ratio).clamp(max=cap)


def masked(log_ratio: Float[Tensor, "*t"], low: float, high: float) -> Float[Tensor, "*t"]:
    weight = torch.exp(log_ratio)
    return torch.where((weight >= low) & (weight <= high), weight, torch.zeros_like(weight))


@dataclass(frozen=True)
class Reject:
    """Leave out what the learner finds too different from what its sampler said. Fields of `algorithm.reject`.

    An estimate of KL(μ ‖ π_θ) in nats, of each token alone or of a sample (its tokens' mean, sum or largest), is
    compared with `above`: k1 = −ℓ by its absolute value, k2 = ½ℓ², k3 = e^ℓ − 1 − ℓ.
    """

    by: Literal["none", "k1", "k2", "k3"] = "none"
    over: Literal["token", "mean", "sum", "max"] = "mean"
    above: float | None = None

    def problems(self) -> list[str]:
        if self.by == "none":
            return [] if self.above is None else [f"above={self.above} needs by=k1, k2 or k3"]
        if self.above is None or self.above <= 0:
            return [f"above={self.above}: by={self.by} needs a bound above 0, in nats"]
        return []

    def keeps(self, log_ratio: Float[Tensor, "t"], x: MicroBatch) -> Bool[Tensor, "t"]:
        """Which tokens stay; those that the policy did not sample always do. What is NaN does not."""
        sampled = x.mask(Origin.POLICY)
        if self.by == "none":
            return torch.ones_like(sampled)
        estimate = {"k1": -log_ratio, "k2": 0.5 * log_ratio.square(), "k3": torch.expm1(log_ratio) - log_ratio}[self.by]
        if self.over == "token":
            statistic = estimate
        elif self.over == "max":
            largest = torch.zeros(x.samples, dtype=estimate.dtype, device=estimate.device)
            statistic = x.spread(largest.scatter_reduce(0, x.segment, estimate.abs(), "amax"))
        else:
            statistic = x.spread(x.per_sequence(estimate, Origin.POLICY, self.over))
        return ~sampled | (statistic.abs() <= (self.above or 0.0))


@dataclass(frozen=True)
class Weighted:
    """What w is. Fields of the recipe's `algorithm` section, for algorithms with a ratio."""

    correction: Literal["none", "tis", "mis"] = "none"  # tis, mis: π_old is π_θ itself, and w corrects for μ
    correction_level: Literal["token", "sequence"] = "token"
    correction_cap: float = 2.0  # C
    correction_low: float = 0.5  # C_low, of "mis"
    reject: Reject = field(default_factory=Reject)
    mask_truncated: bool = False  # a cut answer counts in its group's mean; of the loss it keeps the entropy bonus

    def weight_problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)} must not be negative"
            for name in ("correction_low", "correction_cap")
            if getattr(self, name) < 0
        ]
        return found + [f"reject.{problem}" for problem in self.reject.problems()]

    def weight(self, logp: Float[Tensor, "t"], x: MicroBatch) -> Float[Tensor, "t"]:
        """w, detached: 1 without correction and at tokens that the policy did not sample; 0 for what is left out."""
        gap = log_ratio(logp, x)
        kept = self.reject.keeps(gap, x)
        if self.mask_truncated:
            kept = kept & ~x.spread(x.truncated)
        if self.correction != "none" and self.correction_level == "sequence":
            gap = of_sample(gap, x)
        weight = torch.ones_like(gap)
        if self.correction == "tis":
            weight = truncated(gap, self.correction_cap)
        elif self.correction == "mis":
            weight = masked(gap, self.correction_low, self.correction_cap)
        return torch.where(kept, torch.where(x.mask(Origin.POLICY), weight, 1.0), 0.0)

    def weight_metrics(self, logp: Float[Tensor, "t"], x: MicroBatch) -> dict[str, Float[Tensor, ""]]:
        """Of the policy's tokens: the mean of w, and the shares that were rejected and masked."""
        metrics = {}
        if self.correction != "none":
            metrics["correction_weight"] = x.mean(self.weight(logp, x), Origin.POLICY)
        if self.reject.by != "none":
            kept = self.reject.keeps(log_ratio(logp, x), x)
            metrics["rejected"] = x.mean((~kept).to(x.advantage.dtype), Origin.POLICY)
        if self.mask_truncated:
            metrics["truncated_masked"] = x.mean(x.spread(x.truncated).to(x.advantage.dtype), Origin.POLICY)
        return metrics
