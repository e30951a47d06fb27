"""How much a token that somebody else wrote counts: f(p) of the policy's own probability p = π_θ(token).

The loss is −A·f(p), so the gradient on log π_θ is −A·w with the weight w = p·f′(p):

    shape   f(p)        w            at p → 0   at p = 1
    shaped  p/(p + γ)   γp/(p + γ)²  p/γ        γ/(1 + γ)²    LUFFY: the largest weight, ¼, is at p = γ
    raw     p           p            p          1             π_θ/π_φ with π_φ = 1: learns what it knows already
    sqrt    √p          ½√p          ½√p        ½
    power   p^e         e·p^e        e·p^e      e

`raw` hardly moves a token the policy finds unlikely, which is where a teacher has something to say; `shaped` moves it
γ⁻¹ times as much.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Shape = Literal["shaped", "raw", "sqrt", "power"]


def shaped(logp: Float[Tensor, "*t"], shape: Shape, gamma: float = 0.1, exponent: float = 0.5) -> Float[Tensor, "*t"]:
    """f(exp(logp)) with its gradient; `gamma` is that of "shaped", `exponent` that of "power"."""
    if shape == "sqrt":
        return torch.exp(0.5 * logp)
    if shape == "power":
        return torch.exp(exponent * logp)
    p = torch.exp(logp)
    return p if shape == "raw" else p / (p + gamma)
