"""How well the policy follows a teacher's reasoning: the probability it gives the reference answer after it.

AMPO (algorithms/ampo.py), after RLPR: the trace is cut behind its opening answer tag, the reference answer y* is
put there, and the policy reads it. Ω are the tokens that overlap the characters of y*,

    s = mean_{t∈Ω} π_θ(t | q, trace, <t)

A trace that does not have the tag exactly once says nothing: s is the least there is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int32

from rlkd.core.ports import Tokenizer

Aggregate = Literal["mean_prob", "mean_logp", "product", "geometric"]


@dataclass(frozen=True)
class Tags:
    """Where an answer stands in a text. `gap` follows the opening tag of a text that has no white space there.

    With `close` empty the answer ends the text, as in the tiny student's `…;#825` (open "#", gap "").
    """

    open: str = "<answer>"
    close: str = "</answer>"
    gap: str = " "

    def well_formed(self, text: str) -> bool:
        """Each tag exactly once, opened before it is closed."""
        if text.count(self.open) != 1:
            return False
        if not self.close:
            return True
        return text.count(self.close) == 1 and text.index(self.open) < text.index(self.close)

    def spliced(self, text: str, answer: str) -> tuple[str, int, int] | None:
        """The text up to its answer, with `answer` there instead; where that begins and ends. None without a place."""
        if text.count(self.open) != 1 or not answer:
            return None
        before, _, after = text.partition(self.open)
        gap = after[: len(after) - len(after.lstrip())] or self.gap
        start = before + self.open + gap
        return start + answer + (f" {self.close}" if self.close else ""), len(start), len(start) + len(answer)


@dataclass(frozen=True)
class Spliced:
    """What the policy reads: the prompt, and a trace that ends in the reference answer. `omega` are y*'s tokens."""

    tokens: Int32[np.ndarray, "n"]
    omega: Bool[np.ndarray, "n"]


def spliced(
    prompt: Int32[np.ndarray, "p"], trace: str, answer: str, tags: Tags, tokenizer: Tokenizer
) -> Spliced | None:
    """None if the trace has no place for the answer, or the answer no token. Nothing after Ω is read: it cannot
    change what comes before."""
    found = tags.spliced(trace, answer)
    if found is None:
        return None
    text, start, end = found
    ids, spans = tokenizer.spans(text)
    overlaps = (spans[:, 0] < end) & (spans[:, 1] > start) & (spans[:, 1] > spans[:, 0])
    if not overlaps.any():
        return None
    last = int(np.flatnonzero(overlaps)[-1]) + 1
    omega = np.concatenate([np.zeros(len(prompt), bool), overlaps[:last]])
    return Spliced(np.concatenate([prompt, ids[:last]]).astype(np.int32), omega)


def understood(logp: Float32[np.ndarray, "o"], how: Aggregate) -> float:
    """s of the log-probs of Ω. AMPO: the arithmetic mean of the probabilities."""
    wide = logp.astype(np.float64)
    if how == "mean_prob":
        return float(np.exp(wide).mean())
    if how == "mean_logp":
        return float(wide.mean())
    return math.exp(float(wide.sum() if how == "product" else wide.mean()))


def least(how: Aggregate) -> float:
    """s of a trace that says nothing."""
    return -math.inf if how == "mean_logp" else 0.0


def to_bfloat16(value: float) -> float:
    """Rounded to nearest even, as the released code stores its scores."""
    return float(torch.tensor(value, dtype=torch.float32).to(torch.bfloat16))


def ranked(scores: Sequence[float]) -> list[int]:
    """Places from the largest score to the smallest; of equal ones the earlier first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])
