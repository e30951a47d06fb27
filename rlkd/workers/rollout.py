"""A rollout worker on Ray: an engine in an actor. The engine's class comes by import path, so that neither this module
nor the driver needs vLLM."""

import asyncio
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from jaxtyping import Float32, Int32

from rlkd.core.errors import DataError
from rlkd.core.faults import fault
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import TopK
from rlkd.workers import stacks
from rlkd.workers.vitals import Place, Vitals, here, memory

CANARY = Sampling(max_tokens=4, temperature=0.0)
ENGINES = {"vllm": "rlkd.engines.vllm:VLLMEngine", "hf": "rlkd.engines.hf:HFEngine"}


@dataclass(frozen=True)
class Reading:
    """What a worker makes of fixed tokens."""

    logp: Float32[np.ndarray, "_"]  # of each of them at temperature 1; NaN at the first
    cached: float  # mean |difference| of tokens written after them through the prompt cache, from scoring the whole;
    # NaN if they do not fit twice into the context


class RolloutWorker:
    """The actor. Errors of an engine are RlkdErrors and WorkerLost, which survive the way to the driver."""

    def __init__(self, engine: str, options: Mapping[str, Any]) -> None:
        self._path, self._options = engine, dict(options)
        self._engine: Any = None

    async def start(self) -> float:
        """Load the model (not in __init__, whose errors Ray turns into an actor that died). The seconds it took."""
        began = time.monotonic()
        stacks.listen()
        fault("rollout.start")
        await asyncio.to_thread(self._construct)
        return time.monotonic() - began

    def _construct(self) -> None:
        module, _, name = self._path.partition(":")
        self._engine = getattr(importlib.import_module(module), name).create(**self._options)
        self._engine.start()

    async def generate(self, tokens: Int32[np.ndarray, "p"], n: int, seed: int, sampling: Sampling) -> list[Completion]:
        fault("rollout.generate")
        written: list[Completion] = await self._engine.generate(tokens, n, seed, sampling)
        return written

    async def logp(self, sequences: Sequence[Int32[np.ndarray, "_"]]) -> list[Float32[np.ndarray, "_"]]:
        scored: list[np.ndarray] = await self._engine.logp(sequences)
        return scored

    async def topk(self, sequences: Sequence[Int32[np.ndarray, "_"]], k: int) -> list[TopK]:
        scored: list[TopK] = await self._engine.topk(sequences, k)
        return scored

    async def load(self, ref: WeightRef) -> str:
        digest: str = await self._engine.load(ref)
        return digest

    async def status(self) -> tuple[int, str, int]:
        """(version, digest, samples under way); WorkerLost if the engine is broken although the actor lives."""
        version, digest, busy = self._engine.status()
        return version, digest, busy

    async def vitals(self) -> Vitals:
        """A sign of life; WorkerLost as `status`."""
        version, digest, busy = self._engine.status()
        return Vitals(version, digest, busy, getattr(self._engine, "written", 0), memory())

    async def canary(self, tokens: Int32[np.ndarray, "_"]) -> Reading:
        """Scores the tokens; and writes a little after them (twice over, for more than a block of a prompt cache),
        which must be what scoring all of it afresh says."""
        (logp,) = await self._engine.logp([tokens])
        prompt = np.tile(tokens, 2)
        try:
            (written,) = await self._engine.generate(prompt, 1, 0, CANARY)
            (whole,) = await self._engine.logp([np.concatenate([prompt, written.tokens])])
        except DataError:  # no room
            return Reading(logp, math.nan)
        return Reading(logp, float(np.abs(written.logp - whole[len(prompt) :]).mean()))

    async def abort(self) -> int:
        cut: int = await self._engine.abort()
        return cut

    async def where(self) -> Place:
        return here()

    async def pid(self) -> int:
        return os.getpid()


def spawner(
    engine: str, options: Mapping[str, Any], environment: Mapping[str, str], actor: Callable[[int], Mapping[str, Any]]
) -> Callable[[int], Any]:
    """What a Pool makes its workers with: index -> actor handle. `engine` is a name of ENGINES or an import path;
    `environment` is there before the process imports anything (threads); `actor` gives each one's Ray options."""

    def spawn(index: int) -> Any:
        settings = {"num_cpus": 0, **actor(index)}
        settings |= {"max_restarts": 0, "max_task_retries": 0, "runtime_env": {"env_vars": dict(environment)}}
        return ray.remote(RolloutWorker).options(**settings).remote(ENGINES.get(engine, engine), dict(options))

    return spawn
