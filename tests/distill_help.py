"""For tests of distillation: teachers with given log-probs, and whole steps with knobs and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rlkd.core.batch import MicroBatch, Shares, pack
from rlkd.core.ports import Completion, PolicyOutput, Sampling, as_sample
from rlkd.core.types import TRAINED, Finish, Group, Prompt, Sample, TopK
from tests.toys import prompt_of


def answers(
    tokens: Sequence[Sequence[int]],
    rewards: Sequence[float],
    behavior: Sequence[Sequence[float]],
    prompt: Prompt | None = None,
) -> Group:
    """A group of sampled answers with exactly these tokens."""
    prompt = prompt or prompt_of()
    samples = []
    for t, reward, b in zip(tokens, rewards, behavior, strict=True):
        completion = Completion(np.array(t, np.int32), np.array(b, np.float32), Finish.STOP, (0, 0))
        samples.append(replace(as_sample(prompt, completion), reward=float(reward)))
    return Group(prompt, tuple(samples))


def taught(group: Group, *teachers: Sequence[Sequence[float]]) -> Group:
    """The group with teachers' log-probs: for each teacher those of each sample's answer."""
    samples = []
    for i, sample in enumerate(group.samples):
        rows = np.full((len(teachers), len(sample.tokens)), np.nan, np.float32)
        for row, teacher in zip(rows, teachers, strict=True):
            row[len(sample.tokens) - sample.answer_tokens :] = teacher[i]
        samples.append(replace(sample, teacher_logp=rows))
    return replace(group, samples=tuple(samples))


def likeliest(group: Group, logp: Sequence[np.ndarray], k: int) -> Group:
    """The group with a teacher's k likeliest tokens: `logp[i]` [c v] is its distribution at each place of answer i."""
    samples = []
    for sample, full in zip(group.samples, logp, strict=True):
        n, c = len(sample.tokens), sample.answer_tokens
        ids, values = np.zeros((n, k), np.int32), np.full((n, k), np.nan, np.float32)
        ids[n - c :] = np.argsort(-full, axis=1, kind="stable")[:, :k]
        values[n - c :] = np.take_along_axis(full, ids[n - c :], axis=1)
        samples.append(replace(sample, teacher_topk=TopK(ids, values)))
    return replace(group, samples=tuple(samples))


def credited(algorithm: Any, groups: Sequence[Group]) -> list[Group]:
    return list(algorithm.credit_step([algorithm.credit(g) for g in groups]))


def step_of(
    algorithm: Any,
    groups: Sequence[Group],
    policy: Sequence[torch.Tensor],
    ranks: int = 1,
    max_tokens: int = 10_000,
    knobs: Mapping[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """A whole step, from groups with rewards and signals, through credit, pack and loss: its value, with graph, and its
    metrics. `policy[i]` is what the policy says of the answer of sample i (counted over all groups): log-probs [c] of
    its tokens, or logits [c v] of each place's distribution. Sequences of tokens must differ."""
    samples = [s for g in groups for s in g.samples]
    number = {tuple(s.tokens.tolist()): i for i, s in enumerate(samples)}
    assert len(number) == len(samples)
    knobs = algorithm.knobs(0, {}) if knobs is None else knobs
    total, shares = torch.zeros(()), Shares()
    for turn in pack(credited(algorithm, groups), ranks, max_tokens, algorithm.whole_groups):
        for x in turn:
            own = [policy[number[tuple(x.tokens[x.segment == i].tolist())]] for i in range(x.samples)]
            loss = algorithm.loss(_output(own, x), x, knobs)
            total = total + loss.value * x.weight
            shares.add(loss.metrics, loss.maxima, x.weight)
    return total, Shares.merged([shares])


def _output(own: Sequence[torch.Tensor], x: MicroBatch) -> PolicyOutput:
    trained = x.mask(TRAINED)
    places = trained.nonzero()[:, 0]
    logp = torch.full(x.tokens.shape, torch.nan)
    if own[0].dim() == 1:
        logp = logp.index_put((places,), torch.cat(list(own)))
        return PolicyOutput(logp, -logp.detach(), lambda ids: torch.full(ids.shape, torch.nan))
    full = torch.log_softmax(torch.cat(list(own)), -1)
    logp = logp.index_put((places,), full.gather(1, x.tokens[places, None].long())[:, 0])

    def at(ids: torch.Tensor) -> torch.Tensor:
        values = torch.full(ids.shape, torch.nan)
        return values.index_put((places,), full.gather(1, ids[places].long()))

    return PolicyOutput(logp, -logp.detach(), at)


def step(algorithm: Any, groups: Sequence[Group], policy: Sequence[Any], **how: Any) -> tuple[float, list[Any]]:
    """The step's value and its gradient at each of `policy` (see `step_of`), as lists."""
    leaves = [torch.tensor(np.asarray(p), dtype=torch.float32, requires_grad=True) for p in policy]
    value, _ = step_of(algorithm, groups, leaves, **how)
    value.backward()
    return float(value.detach()), [(torch.zeros_like(p) if p.grad is None else p.grad).tolist() for p in leaves]


def metrics_of(algorithm: Any, groups: Sequence[Group], policy: Sequence[Any], **how: Any) -> dict[str, float]:
    return step_of(algorithm, groups, [torch.tensor(np.asarray(p), dtype=torch.float32) for p in policy], **how)[1]


def differs(a: Sequence[Any], b: Sequence[Any]) -> float:
    """The largest difference of two gradients."""
    pairs = zip(a, b, strict=True)
    return max(float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()) for x, y in pairs)


@dataclass
class TableTeacher:
    """A teacher whose log-prob of a token is −(token mod 7 + offset)/4; it counts what it was asked."""

    offset: int = 1
    asked: list[tuple[int, ...]] = field(default_factory=list)

    async def generate(
        self, tokens: np.ndarray, n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        raise AssertionError("a scorer does not write")

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.asked += [tuple(s.tolist()) for s in sequences]
        return [np.concatenate([[np.nan], self.of(s[1:])]).astype(np.float32) for s in sequences]

    async def topk(self, sequences: Sequence[np.ndarray], k: int) -> list[TopK]:
        self.asked += [tuple(s.tolist()) for s in sequences]
        ids = np.arange(k, dtype=np.int32)
        return [TopK(np.tile(ids, (len(s), 1)), np.full((len(s), k), np.log(0.9 / k), np.float32)) for s in sequences]

    def of(self, tokens: np.ndarray) -> np.ndarray:
        return -(tokens % 7 + self.offset) / 4.0


def origins(sample: Sample) -> list[int]:
    return sorted({int(o) for o in sample.origin})
