"""From the rewards of one group to one advantage per sample. Numpy, on the driver.

NaN rewards (samples nobody could judge) must have been dropped before; a group of one sample is legal.
"""

import numpy as np
from jaxtyping import Float32


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
