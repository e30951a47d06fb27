"""An engine without a model, for tests of actors: quick to start, writes as slowly as it is told to."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import Finish


class Toy:
    def __init__(self, seconds: float) -> None:
        self.seconds, self.written, self.version, self.digest = seconds, 0, 0, ""

    @classmethod
    def create(cls, seconds: float = 0.0, **_: Any) -> "Toy":
        return cls(seconds)

    def start(self) -> None:
        """Nothing to load."""

    async def generate(self, tokens: np.ndarray, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        for _ in range(10):
            await asyncio.sleep(self.seconds / 10)
            self.written += n
        one = Completion(np.zeros(10, np.int32), np.zeros(10, np.float32), Finish.LENGTH, (self.version, self.version))
        return [one] * n

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros(len(s), np.float32) for s in sequences]

    async def load(self, ref: WeightRef) -> str:
        self.version, self.digest = ref.version, ref.digest
        return ref.digest

    def status(self) -> tuple[int, str, int]:
        return self.version, self.digest, 0
