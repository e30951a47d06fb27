"""What happens to a group between the sampler and the buffer."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from rlkd.core.ports import Algorithm, Model, Services
from rlkd.core.types import Group, Sample, Signal, TopK


async def verified(group: Group, ask: Services) -> tuple[Group, int]:
    """The group with rewards, and how many samples were left out because nobody could judge them."""
    samples = await ask.verify(group.prompt, group.samples)
    judged = tuple(s for s in samples if not np.isnan(s.reward))
    return replace(group, samples=judged), len(samples) - len(judged)


async def scored(group: Group, ask: Services, algorithm: Algorithm) -> Group:
    """The group with the log-probs that its algorithm needs: all models at once, one call per model, and each model
    only the samples that the algorithm wants of it."""
    needs = algorithm.needs
    if not needs & {Signal.REFERENCE, Signal.TEACHER, Signal.TEACHER_TOPK} or not group.samples:
        return group
    asked: list[Awaitable[list[Any]]] = [
        _reference(group, ask, algorithm) if Signal.REFERENCE in needs else _nothing(group),
        _teachers(group, ask, algorithm) if Signal.TEACHER in needs else _nothing(group),
        _topk(group, ask, algorithm) if Signal.TEACHER_TOPK in needs else _nothing(group),
    ]
    reference, teachers, topk = await asyncio.gather(*asked)
    samples = tuple(
        replace(s, reference_logp=r, teacher_logp=t, teacher_topk=k)
        for s, r, t, k in zip(group.samples, reference, teachers, topk, strict=True)
    )
    return replace(group, samples=samples)


async def _nothing(group: Group) -> list[Any]:
    return [None] * len(group.samples)


async def _reference(group: Group, ask: Services, algorithm: Algorithm) -> list[Float32[np.ndarray, "_"]]:
    if ask.reference is None:
        raise ValueError("the algorithm needs reference log-probs, but the run has no reference model")
    return await _logps(ask.reference, group, algorithm.wants(group, "reference"))


async def _teachers(group: Group, ask: Services, algorithm: Algorithm) -> list[Float32[np.ndarray, "m _"]]:
    if not ask.teachers:
        raise ValueError("the algorithm needs teacher log-probs, but the run has no teachers")
    asked = [_logps(t, group, algorithm.wants(group, name)) for name, t in ask.teachers.items()]
    by_teacher = await asyncio.gather(*asked)
    return [np.stack(rows) for rows in zip(*by_teacher, strict=True)]


async def _logps(model: Model, group: Group, wanted: np.ndarray) -> list[Float32[np.ndarray, "_"]]:
    """log p of every token; NaN for a sample that is not wanted, and where the model does not say."""
    known: list[Any] = []
    if wanted.any():
        known = await model.logp([s.tokens for s, w in zip(group.samples, wanted, strict=True) if w])
    rows = iter(known)
    return [_one(next(rows)) if w else _unknown(s) for s, w in zip(group.samples, wanted, strict=True)]


def _one(logp: np.ndarray) -> Float32[np.ndarray, "_"]:
    return logp.astype(np.float32)


def _unknown(sample: Sample) -> Float32[np.ndarray, "_"]:
    return np.full(len(sample.tokens), np.nan, np.float32)


async def _topk(group: Group, ask: Services, algorithm: Algorithm) -> list[TopK]:
    """Of the one teacher that is wanted for a sample; of a sample that none is wanted for, ids 0 and NaN."""
    k, found = algorithm.top_k, [_no_topk(s, algorithm.top_k) for s in group.samples]
    if not ask.teachers:
        raise ValueError("the algorithm needs a teacher's likeliest tokens, but the run has no teachers")
    wanted = np.array([algorithm.wants(group, name) for name in ask.teachers])
    if (wanted.sum(0) > 1).any():
        raise ValueError(f"top-k of several teachers for one sample: {', '.join(ask.teachers)}; want one of them")

    async def one(model: Model, places: Sequence[int]) -> None:
        tops = await model.topk([group.samples[i].tokens for i in places], k) if len(places) else []
        for i, top in zip(places, tops, strict=True):
            found[i] = top

    await asyncio.gather(
        *(one(t, np.flatnonzero(w).tolist()) for t, w in zip(ask.teachers.values(), wanted, strict=True))
    )
    return found


def _no_topk(sample: Sample, k: int) -> TopK:
    n = len(sample.tokens)
    return TopK(np.zeros((n, k), np.int32), np.full((n, k), np.nan, np.float32))
