"""Small stand-ins for tests: groups made by hand, and a policy whose log-probs are given."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlkd.core.batch import MicroBatch, pack
from rlkd.core.ports import Completion, PolicyOutput, as_sample
from rlkd.core.types import TRAINED, Finish, Group, Prompt


def prompt_of(n: int = 3, name: str = "p", answer: str = "x") -> Prompt:
    return Prompt(name, np.arange(1, n + 1, dtype=np.int32), answer, text=f"question {name}")


def group_of(
    rewards: Sequence[float],
    lengths: Sequence[int],
    behavior: Sequence[Sequence[float]] | None = None,
    prompt: Prompt | None = None,
) -> Group:
    """A group of sampled answers with these rewards and lengths; tokens count up from 10."""
    prompt = prompt or prompt_of()
    samples = []
    for i, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        logp = np.array(behavior[i] if behavior else [-1.0] * length, np.float32)
        tokens = (10 + i + np.arange(length)).astype(np.int32)
        samples.append(replace(as_sample(prompt, Completion(tokens, logp, Finish.STOP, (0, 0))), reward=float(reward)))
    return Group(prompt, tuple(samples))


def output_of(logp: torch.Tensor, x: MicroBatch) -> PolicyOutput:
    """A policy's output with these log-probs at trained tokens, NaN elsewhere, and entropy −log π."""
    trained = x.mask(TRAINED)
    full = torch.full(x.tokens.shape, torch.nan, dtype=logp.dtype).masked_scatter(trained, logp)
    return PolicyOutput(full, -full.detach(), lambda ids: torch.zeros(ids.shape, dtype=logp.dtype))


def step_loss(
    algorithm: Any, groups: Sequence[Group], logps: Sequence[Sequence[float]], ranks: int = 1, max_tokens: int = 10_000
) -> tuple[float, list[list[float]]]:
    """The whole step's loss through pack and loss, and its gradient at each sample's trained tokens.

    `logps[i]` are log π_θ of the trained tokens of sample i, samples counted over all groups.
    """
    samples = [s for g in groups for s in g.samples]
    table = {_key(s.tokens.tolist(), s.advantage): i for i, s in enumerate(samples)}
    leaves = [torch.tensor(list(p), dtype=torch.float32, requires_grad=True) for p in logps]
    total = torch.zeros(())
    for turn in pack(groups, ranks, max_tokens, algorithm.whole_groups):
        for x in turn:
            order = []
            for i in range(x.samples):
                here = x.segment == i
                order.append(table[_key(x.tokens[here].tolist(), x.advantage[here].numpy())])
            logp = torch.cat([leaves[i] for i in order])
            total = total + algorithm.loss(output_of(logp, x), x, {}).value * x.weight
    total.backward()
    zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    return float(total.detach()), [g.tolist() for g in zero]


def _key(tokens: list[int], advantage: Any) -> tuple[Any, ...]:
    return (*tokens, *(np.round(np.asarray(advantage, np.float64), 5).tolist() if advantage is not None else ()))
