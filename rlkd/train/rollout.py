"""What happens to a group between the sampler and the buffer."""

import asyncio
from dataclasses import replace

import numpy as np

from rlkd.core.ports import Model, Services
from rlkd.core.types import Group, Sample, Signal


async def verified(group: Group, ask: Services) -> tuple[Group, int]:
    """The group with rewards, and how many samples were left out because nobody could judge them."""
    samples = await ask.verify(group.prompt, group.samples)
    judged = tuple(s for s in samples if not np.isnan(s.reward))
    return replace(group, samples=judged), len(samples) - len(judged)


async def scored(group: Group, ask: Services, needs: frozenset[Signal]) -> Group:
    """The group with the log-probs that its algorithm needs; one call per model and group."""
    if not needs or not group.samples:
        return group
    if Signal.REFERENCE in needs:
        if ask.reference is None:
            raise ValueError("the algorithm needs reference log-probs, but the run has no reference model")
        logps = await ask.reference.logp([s.tokens for s in group.samples])
        group = _with(group, [replace(s, reference_logp=p) for s, p in zip(group.samples, logps, strict=True)])
    if Signal.TEACHER in needs:
        if not ask.teachers:
            raise ValueError("the algorithm needs teacher log-probs, but the run has no teachers")
        group = await _teacher_logps(group, list(ask.teachers.values()))
    return group


async def _teacher_logps(group: Group, teachers: list[Model]) -> Group:
    sequences = [s.tokens for s in group.samples]
    by_teacher = await asyncio.gather(*(t.logp(sequences) for t in teachers))
    stacked = [np.stack(rows).astype(np.float32) for rows in zip(*by_teacher, strict=True)]
    return _with(group, [replace(s, teacher_logp=m) for s, m in zip(group.samples, stacked, strict=True)])


def _with(group: Group, samples: list[Sample]) -> Group:
    return replace(group, samples=tuple(samples))
