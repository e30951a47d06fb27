"""Fakes behind the ports, so that the loop is tested without Ray, vLLM and DeepSpeed."""

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.core.batch import MicroBatch
from rlkd.core.errors import LearnerLost, SaveFailed, WorkerLost
from rlkd.core.ports import Completion, Knobs, Sampling
from rlkd.core.types import Finish, Group, Prompt, Sample, TopK
from rlkd.train.ledger import Row
from tests.toys import prompt_of


@dataclass
class FakePolicy:
    """Writes tokens that are a function of the seed; may be slow or get lost."""

    delay: Callable[[], float] = lambda: 0.0
    lose_every: int = 0
    version: int = 0
    calls: int = 0

    async def generate(
        self, tokens: np.ndarray, n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        self.calls += 1
        if self.lose_every and self.calls % self.lose_every == 0:
            raise WorkerLost("rollout-0 died (on purpose)")
        version = self.version
        await asyncio.sleep(self.delay())
        rng = np.random.default_rng(seed)
        made = []
        for _ in range(n):
            length = int(rng.integers(1, 6))
            logp = -rng.exponential(1.0, length).astype(np.float32)
            text = rng.integers(0, 50, length).astype(np.int32)
            made.append(Completion(text, logp, Finish.STOP, (version, self.version)))
        return made

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.full(len(s), -1.0, np.float32) for s in sequences]

    async def topk(self, sequences: Sequence[np.ndarray], k: int) -> list[TopK]:
        return [TopK(np.zeros((len(s), k), np.int32), np.zeros((len(s), k), np.float32)) for s in sequences]


@dataclass
class FakeVerify:
    """Reward: the parity of the first answer token, or `reward(sample)`."""

    reward: Callable[[Sample], float] = lambda s: float(s.tokens[-s.answer_tokens] % 2)

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        await asyncio.sleep(0)
        return tuple(replace(s, reward=self.reward(s)) for s in samples)


@dataclass
class FakeLearner:
    """Counts what it is given."""

    policy: FakePolicy
    ranks: int = 1
    seconds: float = 0.0
    trained: list[list[int]] = field(default_factory=list)  # per step, the first tokens of the groups' prompts
    steps: int = 0
    dies: Callable[[int], bool] = lambda _: False  # at this update, counted over all rebuilds
    cannot_save: int = 0  # how many saves fail
    updates: int = 0
    rebuilt: int = 0
    lost: bool = False

    async def update(self, batch: list[list[MicroBatch]], knobs: Knobs) -> Mapping[str, float]:
        self._alive()
        await asyncio.sleep(self.seconds)
        self.updates += 1
        if self.dies(self.updates):
            self.lost = True
            raise LearnerLost("learner-0.update: killed (on purpose)")
        firsts = set()
        for turn in batch:
            for x in turn:
                for i in range(x.samples):
                    firsts.add(int(x.tokens[x.segment == i][0]))
        self.trained.append(sorted(firsts))
        self.steps += 1
        return {"loss": 0.0}

    async def publish(self, version: int) -> None:
        self._alive()
        self.policy.version = version

    async def save(self, path: str) -> Mapping[str, str]:
        self._alive()
        if self.cannot_save:
            self.cannot_save -= 1
            raise SaveFailed("no space left (on purpose)")
        Path(path).mkdir(parents=True)
        (Path(path) / "steps.json").write_text(json.dumps([self.steps, self.trained]))
        return {"rank-0/weights": str(self.trained)}

    async def export(self, path: str) -> None:
        Path(path).mkdir()

    async def load(self, path: str) -> Mapping[str, str]:
        self._alive()
        self.steps, self.trained = json.loads((Path(path) / "steps.json").read_text())
        return {"rank-0/weights": str(self.trained)}

    async def rebuild(self) -> None:
        self.rebuilt += 1
        self.steps, self.trained, self.lost = 0, [], False

    def _alive(self) -> None:
        if self.lost:
            raise LearnerLost("learner-0: the learner was stopped (on purpose)")


@dataclass
class FakeCurriculum:
    """Numbered prompts, each once: prompt i's first token is 1000 + i."""

    n: int = 100_000
    cursor: int = 0
    observed: int = 0

    def draw(self) -> Prompt:
        prompt = numbered(self.cursor)
        self.cursor += 1
        return prompt

    def observe(self, group: Group) -> None:
        self.observed += 1

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


def numbered(i: int) -> Prompt:
    return replace(prompt_of(3, f"p{i}"), tokens=np.array([1000 + i, 1, 2], np.int32), seed=i)


class AllPrompts(dict[str, Prompt]):
    """Prompt by id, for as many as there are."""

    def __missing__(self, key: str) -> Prompt:
        return numbered(int(key[1:]))


@dataclass
class FakeReport:
    rows: list[tuple[int, list[Group], dict[str, float]]] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    observed: int = 0
    ledger: list[tuple[int, list[Row]]] = field(default_factory=list)

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None:
        self.observed += 1

    def step(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> None:
        self.rows.append((step, list(groups), dict(metrics)))

    def resolved(self, step: int, rows: Sequence[Row]) -> None:
        self.ledger.append((step, list(rows)))

    def event(self, kind: str, text: str, **fields: Any) -> None:
        self.events.append((kind, text))


def long_tailed(seed: int, scale: float = 0.002) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: scale * rng.lognormvariate(0, 1.5)
