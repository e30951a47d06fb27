"""From the rewards of one group to one advantage per sample. Numpy, on the driver.

NaN rewards (samples nobody could judge) must have been dropped before; a group of one sample is legal.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32

from rlkd.core.types import Group, Origin, Sample


def centered(rewards: Float32[np.ndarray, "g"]) -> Float32[np.ndarray, "g"]:
    """r_i − mean(r). Dr. GRPO. A group of one keeps its reward (mean 0)."""
    if len(rewards) < 2:
        return rewards
    return rewards - rewards.mean(dtype=np.float64).astype(np.float32)


def standardized(rewards: Float32[np.ndarray, "g"], epsilon: float = 1e-6) -> Float32[np.ndarray, "g"]:
    """(r_i − mean(r)) / (std(r) + ε), with the sample standard deviation (ddof = 1). GRPO §4.1.2.

    A group of one keeps its reward (mean 0, std 1). Equal rewards give exactly 0: rounding of their mean must not be
    blown up by a standard deviation of 0.
    """
    if len(rewards) < 2:
        return rewards
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    wide = rewards.astype(np.float64)
    return ((wide - wide.mean()) / (wide.std(ddof=1) + epsilon)).astype(np.float32)


def leave_one_out(rewards: Float32[np.ndarray, "g"]) -> Float32[np.ndarray, "g"]:
    """r_i − mean of the others. RLOO (Ahmadian et al. 2024, arXiv:2402.14740). A group of one keeps its reward."""
    n = len(rewards)
    if n < 2:
        return rewards
    wide = rewards.astype(np.float64)
    return (wide - (wide.sum() - wide) / (n - 1)).astype(np.float32)


def against_own(
    rewards: Float32[np.ndarray, "g"], own: Bool[np.ndarray, "g"], standardize: bool, epsilon: float = 1e-6
) -> Float32[np.ndarray, "g"]:
    """(r_i − μ) / (σ + ε) with mean and deviation of the rows `own` alone: what a teacher wrote does not move them.

    σ = 0 is taken as 1, and one row of its own has μ = 0, σ = 1, as LUFFY's released code (`grpo_split`) has it;
    without any, those of all rows.
    """
    baseline = rewards[own].astype(np.float64) if own.any() else rewards.astype(np.float64)
    mean, deviation = (baseline.mean(), baseline.std(ddof=1)) if len(baseline) > 1 else (0.0, 1.0)
    centred = rewards.astype(np.float64) - mean
    if not standardize:
        return centred.astype(np.float32)
    if (baseline == baseline[0]).all():
        deviation = 1.0
    return (centred / (deviation + epsilon)).astype(np.float32)


def sampled_kl(sample: Sample) -> Float32[np.ndarray, "n"]:
    """k1 = log μ − log π_ref at the tokens the policy sampled, 0 elsewhere: for a KL charged in the reward."""
    if sample.reference_logp is None:
        raise ValueError("beta > 0, but a sample came without reference_logp: was the group scored?")
    k1 = sample.behavior_logp - sample.reference_logp
    return np.where(sample.origin == Origin.POLICY, k1, 0.0).astype(np.float32)


def with_advantages(group: Group, values: np.ndarray) -> Group:
    """The group with values[i] at every token of sample i."""
    samples = tuple(
        replace(s, advantage=np.full(len(s.tokens), a, np.float32)) for s, a in zip(group.samples, values, strict=True)
    )
    return replace(group, samples=samples)
