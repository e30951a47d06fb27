"""An engine without a model: what it writes is a function of the seed, at a few milliseconds a token. So a run of real
Ray actors, verifiers and DeepSpeed makes many steps a second, and can be killed hundreds of times."""

import time
from typing import Any

import numpy as np

from rlkd.core.ports import Completion, WeightRef
from rlkd.core.types import Finish, TopK
from rlkd.engines.engine import Engine
from rlkd.engines.jobs import EngineOptions, Job, Limits, Scoring, Writing

SECONDS_A_TOKEN = 0.004
DIGITS = (4, 14)  # token ids of the tiny student's digits


class FastEngine(Engine):
    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._open: dict[int, tuple[Job, int]] = {}  # by job, with the steps left

    def _build(self) -> Limits:
        return Limits(self.options.path, 256, 32, 256)

    def _add(self, job: Job) -> None:
        self._open[job.id] = job, job.sampling.max_tokens if isinstance(job, Writing) else 1

    def _step(self) -> None:
        time.sleep(SECONDS_A_TOKEN)
        for key, (job, left) in list(self._open.items()):
            if left > 1:
                self._open[key] = job, left - 1
                self.written += job.count
                continue
            del self._open[key]
            for part in range(job.count):
                self._finish(job, part, self._write(job, part) if isinstance(job, Writing) else _score(job, part))

    def _write(self, job: Writing, part: int) -> Completion:
        n = job.sampling.max_tokens
        tokens = np.random.default_rng(job.seeds[part]).integers(*DIGITS, n).astype(np.int32)
        return Completion(tokens, np.full(n, -2.3, np.float32), Finish.LENGTH, (self.version, self.version))

    def _drop(self, job: Job) -> dict[int, Completion]:
        self._open.pop(job.id, None)
        return {}

    def _load(self, ref: WeightRef) -> None:
        """There are none to put in; version and digest are what the pool asks for."""

    def _shutdown(self) -> None:
        self._open.clear()


def _score(job: Any, part: int) -> tuple[np.ndarray, TopK]:
    assert isinstance(job, Scoring)
    n = len(job.sequences[part])
    logp = np.full(n, -2.0, np.float32)
    logp[0] = np.nan
    return logp, TopK(np.zeros((n, job.k), np.int32), np.full((n, job.k), np.nan, np.float32))
