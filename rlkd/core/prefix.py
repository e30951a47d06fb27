"""Which tokens of a micro-batch a forward pass must compute when samples of a group share their prompt.

A group of G samples repeats its prompt G times; only one copy is computed. This file is bookkeeping on indices: it
knows nothing of models. `u` counts the computed tokens (u ≤ t).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from rlkd.core.batch import MicroBatch
from rlkd.core.types import Origin


@dataclass(frozen=True)
class Span:
    """A run of computed tokens [start, start+length) that attends causally to itself, and wholly to the run of computed
    tokens [prefix_start, prefix_start+prefix_length) before it."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Layout:
    """What to compute, and where each token's prediction comes from."""

    computed: Int64[Tensor, "u"]  # index into the micro-batch's tokens
    position: Int64[Tensor, "u"]  # place in its own sample, for rotary embeddings
    source: Int64[Tensor, "t"]  # which computed token predicts token t (its predecessor); −1 for a sample's first token
    spans: tuple[Span, ...]


def layout(x: MicroBatch, share: bool = True) -> Layout:
    """The layout of a micro-batch. With `share=False` every sample is computed whole (the plain packed form)."""
    lengths = torch.bincount(x.segment, minlength=x.samples).tolist()
    tokens, origin, group = x.tokens.tolist(), x.origin.tolist(), x.group.tolist()
    computed: list[int] = []
    position: list[int] = []
    source: list[int] = []
    spans: list[Span] = []
    known: dict[tuple[int, ...], Span] = {}  # the prompts of the current group, by their tokens
    start = 0
    for i, length in enumerate(lengths):
        if i and group[i] != group[i - 1]:
            known.clear()
        prompt = next((t for t in range(length) if origin[start + t] != Origin.PROMPT), length) if share else 0
        key = tuple(tokens[start : start + prompt])
        head = known.get(key)
        if head is None:
            head = known[key] = Span(len(computed), prompt)
            computed += range(start, start + prompt)
            position += range(prompt)
            if prompt:
                spans.append(head)
        body = Span(len(computed), length - prompt, head.start, prompt)
        computed += range(start + prompt, start + length)
        position += range(prompt, length)
        if body.length:
            spans.append(body)
        places = [*range(head.start, head.start + prompt), *range(body.start, body.start + body.length)]
        source += [-1, *places[:-1]] if places else []
        start += length
    return Layout(torch.tensor(computed), torch.tensor(position), torch.tensor(source), tuple(spans))
