"""Which teacher a sample is compared with, and what several of them say together. Numpy, on the driver.

Unknown is NaN: a teacher that was not asked, a place it could not score. It never becomes 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

from rlkd.core.batch import Norm
from rlkd.core.errors import ConfigError, DataError
from rlkd.core.types import Group, Origin, Prompt, Sample

FLOOR = -100.0  # a log-prob below this says no more than this; −∞ would make a mean of teachers one teacher's
SCORED = "scored"  # stream: makes a mean over all tokens one over those a teacher scored
ELSE = "*"  # the domain of every prompt whose own is not listed

Rows = Float32[np.ndarray, "m n"]


def mean(rows: Rows) -> Float32[np.ndarray, "n"]:
    """The mean of the log-probs over the teachers that know the token; NaN where none does.

    log π_T enters a reverse KL linearly, so the gradient against this row is the mean of the gradients against each.
    """
    return _weighted(rows, np.ones_like(rows))


def confident(rows: Rows, written: Bool[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """The mean weighted by confidence: softmax over teachers of each one's mean log-prob of the sample's tokens.

    `written` says which tokens count. Teachers are compared over the tokens that all know who know any of them; one
    that knows none has no weight. Without common tokens all weigh the same.
    """
    known = ~np.isnan(rows)
    speaks = (known & written).any(1)
    common = written & known[speaks].all(0)
    if not speaks.any() or not common.any():
        return mean(rows)
    heights = np.maximum(rows[speaks][:, common].astype(np.float64), FLOOR).mean(1)
    weights = np.zeros(len(rows))
    weights[speaks] = np.exp(heights - heights.max())
    return _weighted(rows, np.broadcast_to(weights[:, None], rows.shape))


def _weighted(rows: Rows, weights: np.ndarray) -> Float32[np.ndarray, "n"]:
    known = ~np.isnan(rows)
    weights = np.where(known, weights, 0.0).astype(np.float64)
    values = np.maximum(np.where(known, rows, 0.0).astype(np.float64), FLOOR)
    total = weights.sum(0)
    summed = (weights * values).sum(0)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan).astype(np.float32)


@dataclass(frozen=True)
class Teachers:
    """What algorithms that distil log-probs have in common. Fields of the recipe's `algorithm` section."""

    combine: Literal["one", "mean", "confidence", "domain"] = "one"
    teacher: str | None = None  # of combine=one: its name under `teachers`; None: there is only one
    domain_key: str | None = None  # of combine=domain: the metadata column; None: which dataset the prompt is from
    domains: dict[str, str] = field(default_factory=dict)  # domain -> teacher; `*` stands for all others

    @property
    def teacher_names(self) -> frozenset[str]:
        """The teachers that the recipe must have, as far as they are named here."""
        named = set(self.domains.values()) if self.combine == "domain" else {self.teacher}
        return frozenset(name for name in named if name is not None)

    def teacher_problems(self) -> list[str]:
        found = []
        if self.combine == "domain" and not self.domains:
            found.append("combine=domain needs domains, e.g. {math: NAME, '*': NAME}")
        if self.combine != "domain" and (self.domains or self.domain_key):
            found.append(f"domains and domain_key are of combine=domain, not of combine={self.combine}")
        if self.combine != "one" and self.teacher is not None:
            found.append(f"teacher={self.teacher} is of combine=one, not of combine={self.combine}")
        return found

    def asks(self, prompt: Prompt, model: str) -> bool:
        """Whether the teacher of that name is asked about answers to this prompt."""
        if self.combine == "domain":
            return self.teacher_of(prompt) == model
        return self.teacher is None or self.teacher == model

    def teacher_of(self, prompt: Prompt) -> str:
        """Of combine=domain. DataError for a prompt whose domain has no teacher."""
        column = self.domain_key
        domain = prompt.source if column is None else str(prompt.metadata.get(column, ""))
        name = self.domains.get(domain, self.domains.get(ELSE))
        if name is None:
            raise DataError(
                "RLKD-D320",
                f"prompt {prompt.id} is of the domain `{domain}` ({column or 'its dataset'}), which has no teacher",
                where="algorithm.domains",
                fix=f"add it, or `'*': NAME` for all others; domains with a teacher: {', '.join(self.domains)}",
            )
        return name

    def combined(self, sample: Sample) -> Sample:
        """The sample with one row in teacher_logp, whatever many teachers said.

        ValueError if it was never scored, ConfigError if several teachers spoke where one should.
        """
        rows = sample.teacher_logp
        if rows is None:
            raise ValueError("the loss needs teacher_logp, but a sample came without it: was the group scored?")
        row = confident(rows, sample.origin == Origin.POLICY) if self.combine == "confidence" else mean(rows)
        spoke = int((~np.isnan(rows)).any(1).sum())
        if self.combine in ("one", "domain") and spoke > 1:
            raise ConfigError(
                "RLKD-C011",
                f"algorithm.combine={self.combine}, and {spoke} teachers scored one sample",
                where="algorithm.combine",
                fix="name one in algorithm.teacher, or combine=mean, confidence or domain",
            )
        return replace(sample, teacher_logp=row[None])


def known_row(sample: Sample) -> Bool[np.ndarray, "n"]:
    """Where the teacher's log-prob of the token, or its likeliest tokens, are known; after `combined`."""
    if sample.teacher_topk is not None:
        return ~np.isnan(sample.teacher_topk.logp).any(1)
    assert sample.teacher_logp is not None
    return ~np.isnan(sample.teacher_logp[0])


def with_stream(
    groups: Sequence[Group], name: str, kept: Callable[[Sample], Bool[np.ndarray, "n"]], norm: Norm = "token"
) -> list[Group]:
    """A stream by which a mean over all of the step's policy tokens becomes the mean over the kept ones alone.

    It is all/kept at kept tokens and 0 at others, counted in what `norm` divides by: tokens, or samples that have any.
    NaN everywhere if nothing is kept: the mean of nothing is not known.
    """
    samples = [s for g in groups for s in g.samples]
    masks = [kept(s) & (s.origin == Origin.POLICY) for s in samples]
    if norm == "token":
        everything = sum(int((s.origin == Origin.POLICY).sum()) for s in samples)
        some = sum(int(m.sum()) for m in masks)
    else:
        written = [bool((s.origin == Origin.POLICY).any()) for s in samples]
        everything = len(samples) if norm == "constant" else sum(written)
        some = sum(bool(m.any()) for m in masks)
    scale = everything / some if some else np.nan
    rows = iter(masks)

    def one(sample: Sample) -> Sample:
        row = next(rows)
        values = np.where(row, scale, 0.0 if some else np.nan).astype(np.float32)
        return replace(sample, streams={**sample.streams, name: values})

    return [replace(g, samples=tuple(one(s) for s in g.samples)) for g in groups]
