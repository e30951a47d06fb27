"""The learning rate of a step: a function of the step's number, so nothing of it has to be saved."""

import math
from typing import Literal

Shape = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, peak: float, warmup: int, steps: int, shape: Shape) -> float:
    """Of optimizer step `step` (from 0) of `steps`: up to `peak` in `warmup` steps, then as `shape` says, 0 at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))
