"""Products of float32 matrices on a CPU, by oneDNN where PyTorch has it.

PyTorch's own product is MKL's, which does not use AVX-512 on CPUs that are not Intel's: on an AMD EPYC with two cores
oneDNN was 2.1 times as fast (benchmarks/results/matmul.md). The operator is the one that PyTorch's compiler calls for
linear layers; it takes any strides. Elsewhere – other dtypes, a GPU, a PyTorch without it – this is `torch.mm`.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """a b. Without gradient."""
    if not on_onednn(a) or not a.numel() or not b.numel():  # oneDNN takes no empty matrices
        return torch.mm(a, b)
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


def on_onednn(x: Tensor) -> bool:
    """Whether products with `x` are oneDNN's."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn()


@cache
def _has_onednn() -> bool:
    """The operator is there, and does what it is taken for."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    except (RuntimeError, TypeError):  # another signature in another PyTorch
        return False
    return torch.equal(found, a @ b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = product(x, weight.T)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            product(grad, weight) if needed[0] else None,
            product(grad.T, x) if needed[1] else None,
            grad.sum(0) if needed[2] else None,
        )


def linear(
    x: Float[Tensor, "*r i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None = None
) -> Float[Tensor, "*r o"]:
    """x Wᵀ + b with gradient, as torch.nn.functional.linear, the three products of forward and backward as above."""
    if not on_onednn(x) or weight.dtype != torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.unflatten(0, x.shape[:-1])


__all__ = ["linear", "on_onednn", "product"]
