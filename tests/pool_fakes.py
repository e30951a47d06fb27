"""A cluster in miniature for tests of pools: it makes workers on demand, counts them, and can have them die, hang or
lie."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError

from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import Finish
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.rollout import Reading
from rlkd.workers.vitals import Memory, Place, Vitals

PROMPT = np.arange(12, dtype=np.int32)
SAMPLING = Sampling(max_tokens=4)
ROOMY = Memory(2**30, 10 * 2**30, 20 * 2**30)
QUICK = PoolOptions(timeout_s=5.0, start_s=5.0, sync_s=5.0, backoff_s=0.001)


def weights(version: int) -> WeightRef:
    return WeightRef(version, "somewhere", f"digest-{version}")


class Remote:
    """A method of a handle, as Ray has them."""

    def __init__(self, call: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Coroutine[Any, Any, Any]:
        return self._call(*arguments)


class FakeWorker:
    """Remote methods over a coroutine each; behaves as its cluster says."""

    def __init__(self, cluster: "Fakes", index: int, generation: int) -> None:
        self.cluster, self.index, self.generation = cluster, index, generation
        self.version, self.digest = 0, ""
        self.dead = asyncio.Event()
        self.generated = 0
        self.tokens = 0

    def __getattr__(self, name: str) -> Remote:
        return Remote(getattr(type(self), f"do_{name}").__get__(self))

    async def do_start(self) -> float:
        await self.cluster.on_start(self)
        return 0.0

    async def do_generate(self, tokens: np.ndarray, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        self.generated += 1
        self.cluster.work.append((self.index, self.generation, self.version))
        await self.cluster.on_generate(self)
        written = np.full(sampling.max_tokens, self.index, np.int32)
        return [
            Completion(written, np.zeros(len(written), np.float32), Finish.LENGTH, (self.version, self.version))
        ] * n

    async def do_logp(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        await self.cluster.on_logp(self)
        return [np.zeros(len(s), np.float32) for s in sequences]

    async def do_load(self, ref: WeightRef) -> str:
        await self.cluster.on_load(self, ref)
        self.version, self.digest = ref.version, ref.digest
        return ref.digest

    async def do_status(self) -> tuple[int, str, int]:
        await self.cluster.on_status(self)
        return self.version, self.digest, 0

    async def do_where(self) -> Place:
        return Place(1000 + len(self.cluster.made), self.cluster.node_of(self), "host")

    async def do_vitals(self) -> Vitals:
        version, digest, busy = await self.do_status()
        return Vitals(version, digest, busy, self.tokens, self.cluster.memory)

    async def do_canary(self, tokens: np.ndarray) -> Reading:
        return Reading(np.full(len(tokens), -float(self.version), np.float32), 0.0)

    async def do_abort(self) -> int:
        return 2


async def nothing(*_: Any) -> None:
    """The behaviour of a healthy worker."""


@dataclass
class Fakes:
    """Hooks that may raise, wait or change the worker; and what happened."""

    on_start: Callable[[FakeWorker], Coroutine[Any, Any, None]] = nothing
    on_generate: Callable[[FakeWorker], Coroutine[Any, Any, None]] = nothing
    on_logp: Callable[[FakeWorker], Coroutine[Any, Any, None]] = nothing
    on_load: Callable[[FakeWorker, WeightRef], Coroutine[Any, Any, None]] = nothing
    on_status: Callable[[FakeWorker], Coroutine[Any, Any, None]] = nothing
    node_of: Callable[[FakeWorker], str] = lambda worker: f"node-{worker.generation}"
    memory: Memory = ROOMY  # what every worker says of its machine
    made: list[FakeWorker] = field(default_factory=list)
    killed: list[FakeWorker] = field(default_factory=list)
    work: list[tuple[int, int, int]] = field(default_factory=list)  # worker, generation, version at each generate
    told: list[tuple[str, str]] = field(default_factory=list)  # kind, text
    draining: set[str] = field(default_factory=set)  # nodes

    def spawn(self, index: int) -> FakeWorker:
        worker = FakeWorker(self, index, sum(w.index == index for w in self.made))
        self.made.append(worker)
        return worker

    def pool(self, size: int = 2, options: PoolOptions = QUICK) -> Pool:
        tell = lambda kind, text: self.told.append((kind, text))  # noqa: E731
        known = self.draining.__contains__
        return Pool("rollout", self.spawn, size, SAMPLING, options, self.killed.append, tell, known)


async def forever() -> None:
    await asyncio.Event().wait()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def dies(generation: int = 0, index: int | None = None) -> Callable[[FakeWorker], Coroutine[Any, Any, None]]:
    """A hook: workers of this generation die."""

    async def hook(worker: FakeWorker) -> None:
        if worker.generation == generation and index in (None, worker.index):
            raise ActorDiedError()

    return hook


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)
