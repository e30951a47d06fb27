"""Attention over a packed micro-batch: a span attends to its own past and to the prompt it shares, and to nobody else.

Two forms of the same sum. `PaddedAttention` cuts the spans into pieces, puts pieces of similar size side by side in a
few padded blocks and calls SDPA once a block: on a CPU a hundred small calls cost more than a little padding.
`VarlenAttention` hands all spans to flash-attention at once, without padding. Both are built once per micro-batch from
its `Layout` and serve all layers: what differs between layers (scale, window, softcap) comes with the call.

`u` counts computed tokens, `h` query heads, `k` key/value heads (h a multiple of k), `d` the size of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.nn import functional as F

from rlkd.core.errors import PreflightError
from rlkd.core.prefix import Span

LONGEST_PIECE = 256  # rows of one piece: a longer span is cut, so that a mask wastes at most a piece's square
FREE_PADDING = 4096  # query × key pairs that cost less than another call
PADDING = 0.25  # of a block's pairs, that may be padding


@runtime_checkable
class Attention(Protocol):
    def __call__(
        self,
        query: Float[Tensor, "u h d"],
        key: Float[Tensor, "u k d"],
        value: Float[Tensor, "u k e"],
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "u h e"]: ...


def attention(spans: Sequence[Span], kind: str, device: torch.device) -> Attention:
    """`kind`: "sdpa", "flash", or "auto" (flash on a GPU that has it). Raises PreflightError if flash is not there."""
    usable = device.type == "cuda" and flash_installed()
    if kind == "flash" and not usable:
        raise PreflightError(
            "RLKD-E143",
            "model.attention=flash needs a GPU and the package flash-attn",
            where="model.attention",
            fix="pip install rlkd[gpu] on a machine with a GPU, or set model.attention=auto",
        )
    if usable and kind != "sdpa":
        from flash_attn import flash_attn_varlen_func

        return VarlenAttention.of(spans, device, flash_attn_varlen_func)
    return PaddedAttention.of(spans, device)


def flash_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None


@dataclass(frozen=True)
class Piece:
    """`length` queries from `start` on. Keys: the span's prefix, `earlier` tokens of the span, then themselves."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0
    earlier: int = 0

    @property
    def context(self) -> int:
        return self.prefix_length + self.earlier

    @property
    def pairs(self) -> int:
        return self.length * (self.context + self.length)


def pieces(span: Span) -> list[Piece]:
    """A span without a prefix is one piece (SDPA's causal kernel skips what is masked); others are cut."""
    if not span.prefix_length:
        return [Piece(span.start, span.length)]
    cuts = range(0, span.length, LONGEST_PIECE)
    return [
        Piece(span.start + cut, min(LONGEST_PIECE, span.length - cut), span.prefix_start, span.prefix_length, cut)
        for cut in cuts
    ]


@dataclass(frozen=True)
class Block:
    """Pieces side by side. Keys are as many places as the longest context needs, then the queries themselves."""

    queries: Int64[Tensor, "b q"]  # computed token of each place; padding repeats the piece's last
    filled: Bool[Tensor, "b q"]  # which places are no padding
    keys: Int64[Tensor, "b c"]
    context: Int64[Tensor, "b"]  # tokens of context; places behind them are padding

    @classmethod
    def of(cls, members: Sequence[Piece]) -> "Block":
        def column(name: str) -> Tensor:
            return torch.tensor([getattr(p, name) for p in members])[:, None]

        start, length, prefix, context = map(column, ("start", "length", "prefix_length", "context"))
        row = torch.arange(int(length.max()))
        place = torch.arange(int(context.max()))
        queries = start + torch.minimum(row, length - 1)
        shared = column("prefix_start") + place
        earlier = start - column("earlier") + place - prefix
        before = torch.where(place < prefix, shared, torch.where(place < context, earlier, start))
        return cls(queries, row < length, torch.cat([before, queries], 1), context[:, 0])

    def mask(self, window: int | None) -> Bool[Tensor, "_ 1 q c"] | None:
        """Who sees whom; None where it is plainly causal. One mask for all pieces if they have the same context.

        A place of padding sees at least itself, so that no row of the softmax is empty.
        """
        rows = self.queries.shape[1]
        longest = self.keys.shape[1] - rows
        if longest == 0 and (window is None or window >= rows):
            return None
        context = self.context[:1, None] if bool((self.context == longest).all()) else self.context[:, None]
        place, row = torch.arange(longest), torch.arange(rows)
        at_query = context + row  # place in its sample
        at_key = torch.cat([place.expand(len(context), -1), at_query], 1)
        real = torch.cat([place < context, torch.ones(len(context), rows, dtype=torch.bool)], 1)
        distance = at_query[:, :, None] - at_key[:, None, :]
        seen = real[:, None, :] & (distance >= 0)
        if window is not None:
            seen &= distance < window
        return seen[:, None]


def blocks(spans: Sequence[Span]) -> list[Block]:
    """Similar pieces together, longest first, so that padding stays below PADDING of a block or FREE_PADDING pairs."""
    found: list[list[Piece]] = []
    rows = context = pairs = 0  # of the last block
    for piece in sorted((p for s in spans for p in pieces(s)), key=lambda p: (p.context == 0, -p.length, -p.context)):
        wide = max(context, piece.context)
        padded = (len(found[-1]) + 1) * rows * (wide + rows) if found else 0
        same_kind = (context == 0) == (piece.context == 0)  # a block without any context is plainly causal
        if found and same_kind and padded - pairs - piece.pairs <= max(FREE_PADDING, PADDING * padded):
            found[-1].append(piece)
            context, pairs = wide, pairs + piece.pairs
        else:
            found.append([piece])
            rows, context, pairs = piece.length, piece.context, piece.pairs
    return [Block.of(members) for members in found]


@dataclass(frozen=True)
class PaddedAttention:
    """SDPA over padded blocks, on any device."""

    blocks: tuple[Block, ...]
    place: Int64[Tensor, "u"]  # of each computed token, among all blocks' queries laid end to end
    longest: int  # tokens of the longest sample
    _masks: dict[int | None, list[Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "PaddedAttention":
        found = blocks(spans)
        filled = torch.cat([b.filled.flatten() for b in found]).nonzero()[:, 0]
        token = torch.cat([b.queries.flatten() for b in found])[filled]
        place = torch.empty_like(token)
        place[token] = filled
        moved = (replace(b, queries=b.queries.to(device), keys=b.keys.to(device)) for b in found)
        return cls(tuple(moved), place.to(device), max(s.prefix_length + s.length for s in spans))

    def masks(self, window: int | None, device: torch.device) -> list[Tensor | None]:
        if window is not None and window >= self.longest:
            window = None  # nobody looks that far back
        if window not in self._masks:
            masks = [block.mask(window) for block in self.blocks]
            self._masks[window] = [None if m is None else m.to(device) for m in masks]
        return self._masks[window]

    def __call__(
        self,
        query: Float[Tensor, "u h d"],
        key: Float[Tensor, "u k d"],
        value: Float[Tensor, "u k e"],
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "u h e"]:
        outputs = []
        for block, mask in zip(self.blocks, self.masks(window, query.device), strict=True):
            q, k, v = _take(query, block.queries), _take(key, block.keys), _take(value, block.keys)
            o = _sdpa(q, k, v, mask, scale) if softcap is None else _capped(q, k, v, mask, scale, softcap)
            outputs.append(o.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.place)


def _take(x: Float[Tensor, "u h d"], index: Int64[Tensor, "b n"]) -> Float[Tensor, "b h n d"]:
    return x.index_select(0, index.flatten()).unflatten(0, tuple(index.shape)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if mask is not None and q.is_cuda:  # CUDA's kernels that take a mask do not take grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float) -> Tensor:
    """Attention with s·tanh(scores / s), which SDPA has not; scores and softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v


Kernel = Callable[..., Tensor]  # flash_attn_varlen_func, or what a test puts in its place


@dataclass(frozen=True)
class VarlenAttention:
    """flash-attention over all spans at once; keys of a shared prompt are repeated by index, queries are not.

    Has never run on a GPU yet: its indices are tested on a CPU, against a kernel that does what flash-attn documents
    (with fewer queries than keys, the causal mask is aligned to the bottom right).
    """

    keys: Int64[Tensor, "n"]  # computed token of each key, span after span: the prefix, then the span itself
    query_ends: Int32[Tensor, "_"]  # 0 and the running total of queries
    key_ends: Int32[Tensor, "_"]
    most_queries: int
    most_keys: int
    kernel: Kernel

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device, kernel: Kernel) -> "VarlenAttention":
        own = [torch.arange(s.start, s.start + s.length) for s in spans]
        prefix = [torch.arange(s.prefix_start, s.prefix_start + s.prefix_length) for s in spans]
        keys = [torch.cat(both) for both in zip(prefix, own, strict=True)]
        return cls(
            torch.cat(keys).to(device),
            _ends([s.length for s in spans]).to(device),
            _ends([len(k) for k in keys]).to(device),
            max(s.length for s in spans),
            max(len(k) for k in keys),
            kernel,
        )

    def __call__(
        self,
        query: Float[Tensor, "u h d"],
        key: Float[Tensor, "u k d"],
        value: Float[Tensor, "u k e"],
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "u h e"]:
        return self.kernel(
            query.contiguous(),
            key.index_select(0, self.keys),
            value.index_select(0, self.keys),
            cu_seqlens_q=self.query_ends,
            cu_seqlens_k=self.key_ends,
            max_seqlen_q=self.most_queries,
            max_seqlen_k=self.most_keys,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )


def _ends(lengths: Sequence[int]) -> Int32[Tensor, "_"]:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
