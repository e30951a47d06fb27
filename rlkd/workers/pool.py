"""Several workers behind one `Model`: routing, deadlines, replacement of the lost, the same weights for all.

Ray restarts nothing here. An actor it restarts comes back with its first weights, and the caller cannot tell; a worker
made by the pool gets no work before it has reported the version and digest that the pool delivered last.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from jaxtyping import Float32, Int32

from rlkd.core.errors import InfrastructureError, RlkdError, WorkerLost
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import TopK
from rlkd.workers.ask import Slot, ask

log = logging.getLogger("rlkd.workers")


@dataclass(frozen=True)
class PoolOptions:
    """Deadlines in seconds, and how much may go wrong."""

    timeout_s: float = 600.0  # of one call
    start_s: float = 600.0  # until a new worker is ready for weights
    sync_s: float = 300.0  # until a worker has loaded them
    probe_s: float | None = None  # ask every worker for its status this often; one that does not answer is lost
    at_once: int | None = None  # calls under way on one worker; None: it queues by itself
    replacements: int = 3  # of one worker in a row, without an answer in between
    backoff_s: float = 1.0  # before the second replacement in a row; doubles from then on


class Pool:
    """`size` workers, made by `spawn(index)`: handles with remote methods start, generate, logp, topk, load, status.

    All calls must come from one event loop. A worker that dies, is stuck or reports other weights than it should is
    killed and replaced; its callers get WorkerLost at once. When one place needs more than `replacements` in a row
    every call raises InfrastructureError.
    """

    def __init__(
        self,
        name: str,
        spawn: Callable[[int], Any],
        size: int,
        sampling: Sampling | None = None,
        options: PoolOptions = PoolOptions(),
        kill: Callable[[Any], None] = ray.kill,
    ) -> None:
        self.sampling = sampling  # what generate uses when it is not told
        self.version: int | None = None  # that every worker has acknowledged
        self._name, self._size, self._spawn, self._kill, self._options = name, size, spawn, kill, options
        self._slots: list[Slot] = []
        self._ref: WeightRef | None = None
        self._fatal: str | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._counts = {"lost": 0, "replaced": 0}

    async def start(self) -> None:
        """Make all workers and wait for them. What a worker's start can explain (an RlkdError) is raised as it is."""
        self._slots = [Slot(i, f"{self._name}-{i}") for i in range(self._size)]
        starting = [asyncio.create_task(self._bring_up(slot), name=f"start {slot.name}") for slot in self._slots]
        try:
            await asyncio.gather(*starting)
            self._check()
        except BaseException:
            for task in starting:
                task.cancel()
            self.close()
            raise
        if self._options.probe_s is not None:
            self._background(self._probe(self._options.probe_s), f"probe {self._name}")

    def close(self) -> None:
        """Kill the workers."""
        self._fatal = f"{self._name}: the pool is closed"
        for task in self._tasks:
            task.cancel()
        for slot in self._slots:
            self._discard(slot, self._fatal)

    def counts(self) -> dict[str, int]:
        """Workers lost and replaced since the start."""
        return dict(self._counts)

    # --- the Model

    async def generate(
        self, tokens: Int32[np.ndarray, "p"], n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        how = sampling or self.sampling
        if how is None:
            raise ValueError(f"{self._name}: no Sampling was given, and the pool has no default")
        what = f"generate(prompt {len(tokens)}, samples {n})"
        written: list[Completion] = await self._call(n, what, "generate", tokens, n, seed, how)
        return written

    async def logp(self, sequences: Sequence[Int32[np.ndarray, "_"]]) -> list[Float32[np.ndarray, "_"]]:
        size = sum(len(s) for s in sequences)
        scored: list[np.ndarray] = await self._call(size, f"logp(tokens {size})", "logp", list(sequences))
        return scored

    async def topk(self, sequences: Sequence[Int32[np.ndarray, "_"]], k: int) -> list[TopK]:
        size = sum(len(s) for s in sequences)
        scored: list[TopK] = await self._call(size, f"topk(tokens {size}, k {k})", "topk", list(sequences), k)
        return scored

    async def abort(self) -> int:
        """End what every worker has under way; how many samples were cut."""
        return sum(await asyncio.gather(*(self._abort_one(slot) for slot in self._slots if slot.ready)))

    async def _abort_one(self, slot: Slot) -> int:
        try:
            cut: int = await self._guarded(slot, slot.handle, "abort()", "abort")
        except WorkerLost:  # whose samples ended with it
            return 0
        return cut

    # --- weights

    async def deliver(self, ref: WeightRef) -> None:
        """Give every worker these weights; returns when all have acknowledged them. Who does not is replaced, and the
        replacement gets them before it gets work. InfrastructureError when nobody can be made to take them."""
        self._ref = ref
        await asyncio.gather(*(self._deliver_to(slot, ref) for slot in self._slots if slot.ready))
        async with self._changed:
            await self._changed.wait_for(lambda: self._fatal is not None or any(s.ready for s in self._slots))
        self._check()
        self.version = ref.version

    async def _deliver_to(self, slot: Slot, ref: WeightRef) -> None:
        handle = slot.handle
        try:
            await self._hand_over(slot, ref)
        except (WorkerLost, RlkdError) as error:
            self._lose(slot, handle, str(error))

    async def _hand_over(self, slot: Slot, ref: WeightRef) -> None:
        """Weights to a worker, and its word that it uses them."""
        what = f"load(version {ref.version})"
        loaded = await ask(slot, slot.handle, what, self._options.sync_s, "load", ref)
        version, digest, _ = await ask(slot, slot.handle, "status()", self._options.sync_s, "status")
        if not (loaded == digest == ref.digest and version == ref.version):
            raise WorkerLost(
                f"{slot.name}.{what}: it reports version {version} (digest {digest[:12]}), "
                f"not version {ref.version} (digest {ref.digest[:12]})"
            )

    # --- calls

    async def _call(self, load: int, what: str, method: str, *arguments: Any) -> Any:
        """One call on the worker with the least to do."""
        slot = await self._take(load)
        try:
            return await self._guarded(slot, slot.handle, what, method, *arguments)
        finally:
            slot.load -= load
            slot.calls -= 1
            await self._notify()

    async def _take(self, load: int) -> Slot:
        """The ready worker with the least to do; waits while all are being replaced, or have all they may have."""
        most = self._options.at_once

        def free() -> list[Slot]:
            return [s for s in self._slots if s.ready and (most is None or s.calls < most)]

        if not self._slots:
            raise RuntimeError(f"{self._name}: the pool was not started")
        async with self._changed:
            await self._changed.wait_for(lambda: self._fatal is not None or free())
        self._check()
        slot = min(free(), key=lambda s: (s.load, s.calls))
        slot.load += load
        slot.calls += 1
        return slot

    async def _guarded(self, slot: Slot, handle: Any, what: str, method: str, *arguments: Any) -> Any:
        """`ask`, and if the worker turns out to be lost, its replacement."""
        try:
            answer = await ask(slot, handle, what, self._options.timeout_s, method, *arguments)
        except WorkerLost as error:
            self._lose(slot, handle, str(error))
            self._check()
            raise
        slot.failures = 0
        return answer

    # --- supervision

    def _check(self) -> None:
        if self._fatal is not None:
            raise InfrastructureError(
                "RLKD-I611",
                self._fatal,
                where=self._name,
                fix="the workers' logs (ray logs) say why: out of memory (lower sampler.max_num_seqs or kv_cache_gib), "
                "or too slow (raise sampler.timeout_s)",
            )

    def _lose(self, slot: Slot, handle: Any, why: str) -> None:
        """A worker is lost: no more work for it, its callers are told, another one is made. Once per worker."""
        if handle is None or slot.handle is not handle:
            return
        self._discard(slot, why)
        self._charge(slot, why)
        if self._fatal is None:
            self._background(self._bring_up(slot), f"replace {slot.name}")
        else:
            self._background(self._notify(), f"end of {self._name}")

    def _discard(self, slot: Slot, why: str) -> None:
        handle, slot.handle, slot.ready = slot.handle, None, False
        if not slot.lost.done():
            slot.lost.set_exception(WorkerLost(why))
            slot.lost.exception()  # it is looked at by those who wait, if any do
        if handle is not None:
            self._kill(handle)

    def _charge(self, slot: Slot, why: str) -> None:
        self._counts["lost"] += 1
        slot.failures += 1
        log.warning("lost %s (%d in a row): %s", slot.name, slot.failures, why)
        if slot.failures > self._options.replacements:
            self._fatal = f"{slot.name} was lost {slot.failures} times in a row without an answer; the last time: {why}"

    async def _bring_up(self, slot: Slot) -> None:
        """Make workers for a slot until one has the current weights."""
        while self._fatal is None:
            if slot.failures > 1:
                await asyncio.sleep(self._options.backoff_s * 2 ** (slot.failures - 2))
            slot.lost = asyncio.get_running_loop().create_future()
            slot.handle = self._spawn(slot.index)
            try:
                await ask(slot, slot.handle, "start()", self._options.start_s, "start")
                await self._catch_up(slot)
            except WorkerLost as error:
                self._discard(slot, str(error))
                self._charge(slot, str(error))
                continue
            slot.ready = True
            self._counts["replaced"] += slot.failures > 0
            break
        await self._notify()

    async def _catch_up(self, slot: Slot) -> None:
        """Hand over weights until they are the current ones: others may be delivered in the meantime."""
        done: WeightRef | None = None
        while (ref := self._ref) is not done and ref is not None:
            try:
                await self._hand_over(slot, ref)
                done = ref
            except RlkdError as error:
                if self._ref is ref:  # not just overwritten by the next version
                    raise WorkerLost(str(error)) from error

    async def _probe(self, every_s: float) -> None:
        """A worker may be stuck while its actor lives, and nobody may be waiting for it: ask all now and then."""
        while self._fatal is None:
            await asyncio.sleep(every_s)
            await asyncio.gather(*(self._probe_one(slot, every_s) for slot in self._slots if slot.ready))

    async def _probe_one(self, slot: Slot, timeout_s: float) -> None:
        handle = slot.handle
        try:
            await ask(slot, handle, "status()", timeout_s, "status")
        except WorkerLost as error:
            self._lose(slot, handle, str(error))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _background(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        """An error in a background task (a bug, or a worker's RlkdError at start) must reach whoever calls next."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fatal = f"{task.get_name()} failed: {error}"
            self._background(self._notify(), f"end of {self._name}")
