"""The optimizer: AdamW that looks before it steps, and the learning rate of each step."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Shape = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, peak: float, warmup: int, steps: int, shape: Shape) -> float:
    """Of optimizer step `step` (from 0) of `steps`: up to `peak` in `warmup` steps, then by `shape` towards 0.

    A function of the step's number alone, so nothing of it has to be saved.
    """
    if step < warmup:
        return peak * ((step + 1) / warmup)
    if shape == "constant":
        return peak
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    params = [p for p in module.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": params}]
    groups = [[p for p in params if (p.dim() > 1) == matrix] for matrix in (True, False)]
    return [{"params": g, "weight_decay": d} for g, d in zip(groups, (weight_decay, 0.0), strict=True) if g]


def finite_norm(norm: Any) -> bool:
    """Whether a gradient's norm is one; DeepSpeed says −1 for what is not finite, and nothing where it did not look."""
    return norm is not None and 0 <= float(norm) < math.inf


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that does not step on a gradient that is not finite; under ZeRO-0 it clips, too."""

    clip_to: float | None = None
    norm_from: Any = None  # the ZeRO optimizer around this one, which has computed and clipped to the norm of all ranks
    veto: bool = False  # do not step, whatever the gradient
    _global_grad_norm: Any = None  # where DeepSpeed's engine looks for it

    def step(self, closure: Any = None) -> Any:
        if self.norm_from is not None:
            self._global_grad_norm = self.norm_from._global_grad_norm
        elif self.clip_to is not None:
            self._global_grad_norm = self._clip(self.clip_to)
        return super().step(closure) if finite_norm(self._global_grad_norm) and not self.veto else None

    def _clip(self, largest: float) -> Tensor:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if float(norm) > largest:  # otherwise the gradients need not be touched
            torch.nn.utils.clip_grads_with_norm_(params, largest, norm)
        return norm
