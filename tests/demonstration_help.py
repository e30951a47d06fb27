"""Rows by a teacher and rows by the policy, made by hand, and fakes that guidance can ask."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlkd.core.ports import Completion, Sampling, Services, as_demonstration, as_sample
from rlkd.core.types import Demonstration, Finish, Group, Prompt, Sample
from rlkd.data import HFTokenizer
from tests.fakes import FakePolicy, FakeVerify
from tests.toys import prompt_of


def demonstration(tokens: Sequence[int], teacher: str = "t", quality: float = math.nan) -> Demonstration:
    return Demonstration(teacher, np.array(tokens, np.int32), quality)


def teacher_row(length: int, reward: float, start: int = 500, prompt: Prompt | None = None) -> Sample:
    """A whole worked answer; its tokens count up from `start`."""
    made = demonstration(range(start, start + length))
    return replace(as_demonstration(prompt or prompt_of(), made, (0, 0)), reward=float(reward))


def policy_row(behavior: Sequence[float], reward: float, start: int = 10, prompt: Prompt | None = None) -> Sample:
    """An answer of the policy with these log-probs; its tokens count up from `start`."""
    tokens = np.arange(start, start + len(behavior), dtype=np.int32)
    written = Completion(tokens, np.array(behavior, np.float32), Finish.STOP, (0, 0))
    return replace(as_sample(prompt or prompt_of(), written), reward=float(reward))


def rows_of(rewards: Sequence[float], teachers: Sequence[int] = ()) -> Group:
    """A group of rows of two tokens with these rewards; those at `teachers` are a teacher's."""
    rows = [
        teacher_row(2, r, 500 + 10 * i) if i in teachers else policy_row([-1.0, -1.0], r, 10 * (i + 1))
        for i, r in enumerate(rewards)
    ]
    return Group(prompt_of(), tuple(rows))


def with_advantages(samples: Sequence[Sample], values: Sequence[float]) -> Group:
    made = [replace(s, advantage=np.full(len(s.tokens), a, np.float32)) for s, a in zip(samples, values, strict=True)]
    return Group(prompt_of(), tuple(made))


def advantages(algorithm: Any, group: Group) -> list[float]:
    return [float(s.advantage[-1]) for s in algorithm.credit(group).samples]


@dataclass
class Reader(FakePolicy):
    """A policy that scores what it is given by `says(text)`: the log-probs of the last tokens."""

    tokenizer: HFTokenizer | None = None
    says: Callable[[str], Sequence[float]] = lambda _: [-1.0]
    calls_of_logp: int = 0
    read: list[str] = field(default_factory=list)

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert self.tokenizer is not None
        self.calls_of_logp += 1
        made = []
        for tokens in sequences:
            text = self.tokenizer.decode(tokens)
            self.read.append(text)
            last = np.array(self.says(text), np.float32)
            made.append(np.concatenate([np.full(len(tokens) - len(last), np.nan), last]).astype(np.float32))
        return made


def services(
    policy: Any = None,
    reward: Callable[[Sample], float] = lambda _: 1.0,
    tokenizer: HFTokenizer | None = None,
    max_tokens: int = 100,
    **more: Any,
) -> Services:
    return Services(
        policy or FakePolicy(), FakeVerify(reward), tokenizer=tokenizer, sampling=Sampling(max_tokens), **more
    )
