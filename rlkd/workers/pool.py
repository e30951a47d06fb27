"""Several workers behind one `Model`, with the same weights for all. Who gets a call is in calls.py, what becomes of
lost workers in crew.py; a replacement gets no work before it has reported the version and digest that the pool
delivered last.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import ray
from jaxtyping import Float32, Int32
from ray.exceptions import RayTaskError

from rlkd.core.errors import InfrastructureError, RlkdError, WorkerLost
from rlkd.core.peak import GIB
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import TopK
from rlkd.workers.ask import Slot, ask
from rlkd.workers.calls import Calls
from rlkd.workers.crew import Seated, Stacks
from rlkd.workers.limits import PoolOptions
from rlkd.workers.rollout import Reading

Bring = Callable[[WeightRef, str], Awaitable[WeightRef]]
__all__ = ["Pool", "PoolOptions"]


class Pool(Calls):
    """`size` workers, made by `spawn(index)`: handles with the remote methods of RolloutWorker.

    All calls must come from one event loop. A worker that dies, is stuck or reports other weights than it should is
    killed and replaced; its callers get WorkerLost at once. `was_draining(node)` says whether a node is known to go
    away: what is lost there is nobody's fault. `stacks` takes those of a stuck worker before it is killed. `bring`
    gives what a worker on that node can load, where it cannot read what the learner published (workers/carrier.py).
    """

    def __init__(
        self,
        name: str,
        spawn: Callable[[int], Any],
        size: int,
        sampling: Sampling | None = None,
        options: PoolOptions | None = None,
        kill: Callable[[Any], None] = ray.kill,
        tell: Callable[[str, str], None] = lambda *_: None,
        was_draining: Callable[[str], bool] = lambda _: False,
        stacks: Stacks | None = None,
        seated: Seated | None = None,
        bring: Bring | None = None,
    ) -> None:
        super().__init__(name, spawn, size, options or PoolOptions(), kill, tell, was_draining, stacks, seated)
        self._bring = bring
        self.sampling = sampling  # what generate uses when it is not told
        self.version: int | None = None  # that every worker has acknowledged
        self._ref: WeightRef | None = None

    # --- the Model

    async def generate(
        self, tokens: Int32[np.ndarray, "p"], n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        how = sampling or self.sampling
        if how is None:
            raise ValueError(f"{self._name}: no Sampling was given, and the pool has no default")
        what = f"generate(prompt {len(tokens)}, samples {n})"
        ref = self._ref
        versions = (0, 0) if ref is None else (ref.version, ref.version)
        written: list[Completion] = await self._in_time(
            how.max_tokens,
            lambda: self._ref is ref,
            lambda answer: all(one.versions == versions for one in answer),
            n, what, "generate", tokens, n, seed, how,
        )  # fmt: skip
        for one in written:
            if len(one.tokens) != len(one.logp):  # what is trained is these tokens, each with its own log-prob
                raise InfrastructureError(
                    "RLKD-I617",
                    f"{what}: a sample of {len(one.tokens)} tokens came with {len(one.logp)} log-probs",
                    where=self._name,
                    fix=f"{self._options.advice.engine}, and report this with the versions that `rlkd doctor` prints",
                )
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

    async def canary(self, tokens: Int32[np.ndarray, "_"]) -> dict[str, Reading]:
        """What every worker makes of the same tokens, by its name; who is lost meanwhile is left out."""
        asked = [slot for slot in self._slots if slot.ready]
        work = [self._guarded(s, s.handle, f"canary(tokens {len(tokens)})", "canary", tokens) for s in asked]
        found = await asyncio.gather(*work, return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, WorkerLost):
                raise error
        return {slot.name: reading for slot, reading in zip(asked, found, strict=True) if isinstance(reading, Reading)}

    def metrics(self) -> dict[str, float]:
        """The most memory that any of its workers ever held, in GiB, as far as they have said; calls since the start
        that a second worker was asked, too, and how many of these it won."""
        known = [s.vitals.memory.peak for s in self._slots if s.vitals is not None and s.vitals.memory.peak]
        memory = {f"memory/{self._name}_peak_gib": max(known) / GIB} if known else {}
        return memory | ({} if self._pace is None else {name: float(n) for name, n in self._hedged.items()})

    # --- weights

    async def deliver(self, ref: WeightRef) -> None:
        """Give every worker these weights; returns when all have acknowledged them. Who does not is replaced, and the
        replacement gets them before it gets work. NoWorkers when nobody can be made to take them."""
        self._ref = ref
        await asyncio.gather(*(self._deliver_to(slot, ref) for slot in self._slots if slot.ready))
        async with self._changed:
            await self._changed.wait_for(lambda: self._end is not None or any(s.ready for s in self._slots))
        self._check()
        self.version = ref.version

    def withdraw(self) -> None:
        """The weights delivered last are not to be had any more: a new worker waits for the next ones. Nobody may ask
        for work before."""
        self._ref = None

    async def _deliver_to(self, slot: Slot, ref: WeightRef) -> None:
        handle = slot.handle
        slot.loading = True
        try:
            await self._hand_over(slot, ref)
        except WorkerLost as lost:
            self._lose(slot, handle, lost)
        except (RlkdError, RayTaskError) as error:
            self._lose(slot, handle, WorkerLost(str(error)))
        finally:
            slot.loading = False
            slot.progress.begin(time.monotonic())

    async def _hand_over(self, slot: Slot, ref: WeightRef) -> None:
        """Weights to a worker, and its word that it uses them."""
        what = f"load(version {ref.version})"
        there = ref if self._bring is None or slot.place is None else await self._bring(ref, slot.place.node)
        loaded = await ask(slot, slot.handle, what, self._options.sync_s, "load", there)
        slot.vitals = now = await ask(slot, slot.handle, "vitals()", self._options.sync_s, "vitals")
        version, digest = now.version, now.digest
        if not (loaded == digest == ref.digest and version == ref.version):
            raise WorkerLost(
                f"{slot.name}.{what}: it reports version {version} (digest {digest[:12]}), "
                f"not version {ref.version} (digest {ref.digest[:12]})"
            )

    async def _equip(self, slot: Slot) -> None:
        """Hand over weights until they are the current ones: others may be delivered in the meantime."""
        done: WeightRef | None = None
        while (ref := self._ref) is not done and ref is not None:
            try:
                await self._hand_over(slot, ref)
                done = ref
            except (RlkdError, RayTaskError) as error:
                if self._ref is ref:  # not just overwritten by the next version
                    raise WorkerLost(str(error)) from error
