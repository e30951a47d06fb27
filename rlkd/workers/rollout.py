"""A rollout worker on Ray: an engine in an actor. The engine's class comes by import path, so that neither this module
nor the driver needs vLLM."""

import asyncio
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from jaxtyping import Float32, Int32

from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import TopK

ENGINES = {"vllm": "rlkd.engines.vllm:VLLMEngine", "hf": "rlkd.engines.hf:HFEngine"}


class RolloutWorker:
    """The actor. Errors of an engine are RlkdErrors and WorkerLost, which survive the way to the driver."""

    def __init__(self, engine: str, options: Mapping[str, Any]) -> None:
        self._path, self._options = engine, dict(options)
        self._engine: Any = None

    async def start(self) -> float:
        """Load the model (not in __init__, whose errors Ray turns into an actor that died). The seconds it took."""
        began = time.monotonic()
        await asyncio.to_thread(self._construct)
        return time.monotonic() - began

    def _construct(self) -> None:
        module, _, name = self._path.partition(":")
        self._engine = getattr(importlib.import_module(module), name).create(**self._options)
        self._engine.start()

    async def generate(self, tokens: Int32[np.ndarray, "p"], n: int, seed: int, sampling: Sampling) -> list[Completion]:
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

    async def abort(self) -> int:
        cut: int = await self._engine.abort()
        return cut

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
