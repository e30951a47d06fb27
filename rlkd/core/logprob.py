"""Log-probabilities without the logits: from hidden states and the head's weight to the log-prob of chosen tokens.

With logits l = h Wᵀ + b, softcap s and temperature τ the distribution of a token is softmax(z),

    z = s·tanh(l / s) / τ   (z = l / τ without softcap),      log Z = logsumexp(z),
    log p(y) = z_y − log Z,      H = −Σ_j p_j log p_j = log Z − Σ_j p_j z_j.

The matrix z [r, v] is never held: `Head.rows` rows of it are computed at a time, and again in the backward pass,

    ∂/∂z_j = (1[j=y] − p_j)·∂log p(y)  −  p_j (log p_j + H)·∂H  +  p_j·∂log Z .

Only the last chunk of the forward pass is kept for the backward pass, so a micro-batch of at most `rows` rows
recomputes nothing. Everything is computed in float32 (float64 for float64 inputs), whatever the inputs' dtype.

This is the only place that turns hidden states into probabilities; `engines/model.py` knows about the shift by one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlkd.core.matmul import on_onednn, product

CHUNK_LOGITS = 2**22  # logits worth holding at once whatever the number of rows: 16 MiB of float32


@dataclass(frozen=True)
class Head:
    """How hidden states become the distribution of the next token."""

    temperature: float = 1.0  # τ
    softcap: float | None = None  # s, of Gemma 2
    rows: int = 128  # rows of logits held at once

    def chunks(self, rows: int, vocabulary: int) -> list[slice]:
        """Slices of at most `self.rows` rows, or more where the vocabulary is so small that they cost nothing."""
        size = max(self.rows, CHUNK_LOGITS // vocabulary)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def token_logp(
    hidden: Float[Tensor, "r h"],
    weight: Float[Tensor, "v h"],
    bias: Float[Tensor, "v"] | None,
    targets: Int[Tensor, "r"],
    head: Head,
) -> tuple[Float[Tensor, "r"], Float[Tensor, "r"], Float[Tensor, "r"]]:
    """(log p(targets), entropy in nats, log Z) of each row, each with gradient to hidden, weight and bias."""
    logp, entropy, log_z = _TokenLogp.apply(hidden, weight, bias, targets, head)
    return logp, entropy, log_z


def tokens_at(
    hidden: Float[Tensor, "r h"],
    weight: Float[Tensor, "v h"],
    bias: Float[Tensor, "v"] | None,
    ids: Int[Tensor, "r k"],
    log_z: Float[Tensor, "r"],
    head: Head,
) -> Float[Tensor, "r k"]:
    """log p of k other tokens of each row, given `log_z` of `token_logp`; with gradient, also through `log_z`.

    Costs k dot products a row, not a second pass over the vocabulary.
    """
    logits = _Picked.apply(hidden, weight, ids, head)
    if bias is not None:
        logits = logits + bias[ids].to(logits.dtype)
    return _tempered(logits, head) - log_z[:, None]


@torch.no_grad()
def likeliest(
    hidden: Float[Tensor, "r h"],
    weight: Float[Tensor, "v h"],
    bias: Float[Tensor, "v"] | None,
    k: int,
    head: Head,
) -> tuple[Int[Tensor, "r k"], Float[Tensor, "r k"]]:
    """The k likeliest tokens of each row, likeliest first, and their log-probs. Without gradient."""
    ids = hidden.new_empty(len(hidden), k, dtype=torch.int64)
    logp = hidden.new_empty(len(hidden), k, dtype=_wide(hidden))
    logits = _Logits(hidden, weight, bias, head)
    for rows in logits.chunks:
        z = logits.tempered(rows)
        top = z.topk(k, dim=1)
        ids[rows], logp[rows] = top.indices, top.values - z.logsumexp(1, keepdim=True)
    return ids, logp


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy, log_z = (hidden.new_empty(len(hidden), dtype=_wide(hidden)) for _ in range(3))
        logits = _Logits(hidden, weight, bias, head)
        p = torch.empty_like(logits.room)
        z: Tensor | None = None
        for rows in logits.chunks:
            z = logits.tempered(rows)
            peak = z.amax(1, keepdim=True)
            z.sub_(peak)
            chosen = z.gather(1, targets[rows, None].long())[:, 0]
            weights = torch.exp(z, out=p[: len(z)])
            total = weights.sum(1)
            log_total = total.log()
            logp[rows] = chosen - log_total
            entropy[rows] = log_total - torch.linalg.vecdot(weights, z) / total
            log_z[rows] = log_total + peak[:, 0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_z)
        ctx.head, ctx.room = head, logits.room
        # log p of the last chunk; but with a softcap backward needs the logits before it
        ctx.last = None if z is None or head.softcap is not None else z.sub_(log_total[:, None])
        return logp, entropy, log_z

    @staticmethod
    def backward(
        ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_log_z: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, log_z = ctx.saved_tensors
        logits = _Logits(hidden, weight, bias, ctx.head, ctx.room)
        grads = _Gradients(logits, ctx.needs_input_grad)
        log_p, ctx.last = ctx.last, None  # destroyed below
        for rows in reversed(logits.chunks):
            slope = None
            if log_p is None:
                z, slope = logits.with_slope(rows)
                log_p = z.sub_(log_z[rows, None])
            by_p = torch.zeros_like(log_z[rows])  # ∂/∂z_j = p_j·(by_p − ∂H·log p_j) + 1[j=y]·∂log p(y)
            if g_log_z is not None:
                by_p = by_p + g_log_z[rows]
            if g_logp is not None:
                by_p = by_p - g_logp[rows]
            if g_entropy is None:
                dz = log_p.exp_().mul_(by_p[:, None])
            else:
                by_p = by_p - g_entropy[rows] * entropy[rows]
                dz = log_p.exp().mul_(log_p.mul_(-g_entropy[rows, None]).add_(by_p[:, None]))
            if g_logp is not None:
                dz.scatter_add_(1, targets[rows, None].long(), g_logp[rows, None])
            grads.add(rows, dz if slope is None else dz.mul_(slope))
            log_p = None
        return (*grads.like(hidden, weight, bias), None, None)


class _Logits:
    """The logits of a chunk of rows at a time, always in the same memory (fresh pages cost a tenth of the product)."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, room: Tensor | None = None
    ) -> None:
        self.wide = _wide(hidden)
        self.on_gpu = hidden.is_cuda
        self.hidden, self.weight, self.bias, self.head = self.operand(hidden), self.operand(weight), bias, head
        self.chunks = head.chunks(len(hidden), len(weight))
        if room is None:
            room = hidden.new_empty(self.chunks[0].stop if self.chunks else 0, len(weight), dtype=self.wide)
        self.room = room

    def operand(self, x: Tensor) -> Tensor:
        """Of a product that is summed in float32: bfloat16 stays so on a GPU, which multiplies it many times faster."""
        return x if self.on_gpu else x.to(self.wide)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if on_onednn(a):
            return product(a, b)
        if a.dtype == self.wide:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.wide, out=out)

    def plain(self, rows: slice) -> Tensor:
        """l of these rows, until the next call."""
        logits = self.product(self.hidden[rows], self.weight.T, out=self.room[: rows.stop - rows.start])
        return logits if self.bias is None else logits.add_(self.bias)

    def tempered(self, rows: slice) -> Tensor:
        """z of these rows, until the next call."""
        return _tempered(self.plain(rows), self.head)

    def with_slope(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """z of these rows, and dz/dl·τ = 1 − tanh²(l/s); None without softcap, where it is 1."""
        z = self.plain(rows)
        if self.head.softcap is None:
            return _tempered(z, self.head), None
        slope = torch.tanh(z / self.head.softcap).square_().neg_().add_(1.0)
        return _tempered(z, self.head), slope


class _Gradients:
    """Accumulates what dz [rows, v] means for hidden, weight and bias; only for those that need it."""

    def __init__(self, logits: _Logits, needed: tuple[bool, ...]) -> None:
        wide, hidden, weight, bias = logits.wide, logits.hidden, logits.weight, logits.bias
        self._logits = logits
        self._scale = 1.0 / logits.head.temperature
        self._hidden = torch.empty_like(hidden, dtype=wide) if needed[0] else None
        self._weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, rows: slice, dz: Tensor) -> None:
        logits = self._logits
        if self._scale != 1.0:
            dz.mul_(self._scale)
        if self._bias is not None:
            self._bias += dz.sum(0)
        dz = dz.to(logits.hidden.dtype)
        if self._hidden is not None:
            self._hidden[rows] = logits.product(dz, logits.weight, out=self._hidden[rows])
        if self._weight is None:
            return
        if on_onednn(dz):
            self._weight += product(dz.T, logits.hidden[rows])
        elif dz.dtype == self._weight.dtype:
            self._weight.addmm_(dz.T, logits.hidden[rows])
        else:
            self._weight += torch.mm(dz.T, logits.hidden[rows], out_dtype=self._weight.dtype)

    def like(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The three gradients, in the dtypes of the inputs."""
        grads = (self._hidden, self._weight, self._bias)
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


class _Picked(torch.autograd.Function):
    """hidden[r] · weight[ids[r, k]]: a few logits of each row, in chunks of rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, head: Head) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.chunks = head.chunks(len(hidden), max(ids.shape[1] * weight.shape[1], 1))
        picked = hidden.new_empty(ids.shape, dtype=_wide(hidden))
        for rows in ctx.chunks:
            columns = weight[ids[rows]].to(picked.dtype)
            picked[rows] = torch.bmm(columns, hidden[rows, :, None].to(picked.dtype))[..., 0]
        return picked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, ids = ctx.saved_tensors
        g_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        g_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for rows in ctx.chunks:
            if g_hidden is not None:
                columns = weight[ids[rows]].to(grad.dtype)
                g_hidden[rows] = torch.bmm(grad[rows, None, :], columns)[:, 0].to(hidden.dtype)
            if g_weight is not None:
                outer = grad[rows, :, None] * hidden[rows, None, :].to(grad.dtype)
                g_weight.index_add_(0, ids[rows].flatten(), outer.flatten(0, 1))
        return g_hidden, None if g_weight is None else g_weight.to(weight.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tempered(logits: Tensor, head: Head) -> Tensor:
    """z from l. In place where no gradient is recorded."""
    in_place = not logits.requires_grad
    if head.softcap is not None:
        s = head.softcap
        logits = logits.div_(s).tanh_().mul_(s) if in_place else torch.tanh(logits / s) * s
    if head.temperature == 1.0:
        return logits
    return logits.div_(head.temperature) if in_place else logits / head.temperature


__all__ = ["Head", "likeliest", "token_logp", "tokens_at"]
