"""The learner on Ray: one actor per rank, and the driver's view of all of them, which is the port `Learner`."""

import asyncio
import importlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rlkd.core.batch import MicroBatch, Shares, effective_sample_size
from rlkd.core.errors import LearnerLost, RlkdError, SaveFailed, WorkerLost
from rlkd.core.ports import Algorithm, Knobs, WeightRef
from rlkd.workers import stacks
from rlkd.workers.ask import call
from rlkd.workers.network import talk_over

ENGINE = "rlkd.engines.deepspeed"
START_S = 600.0  # to load the model and meet
CLOSE_S = 10.0  # to remove what was published; a rank that hangs is killed all the same
STORE_S = 60.0  # to open the store where the ranks meet
CAUSE_S = 10.0  # between a broken connection and Ray's word that its other end died


class LearnerRank:
    """The actor of one rank. Its engine comes by import path, so that the driver needs no DeepSpeed."""

    def __init__(self, rank: int, ranks: int, weights_directory: str) -> None:
        self.rank, self.ranks, self._weights_directory = rank, ranks, weights_directory
        self._store: Any = None
        self._engine: Any = None
        self._publisher: Any = None

    def open_store(self) -> str:
        """Rank 0: open the place where the ranks meet, on a port that the system chooses; host:port."""
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, self.ranks, is_master=True, wait_for_workers=False)
        return f"{host}:{self._store.port}"

    def start(self, store: str, options: Mapping[str, Any], algorithm: Algorithm) -> None:
        """Load the model and meet the other ranks; `store` is host:port of rank 0's."""
        from torch.distributed import TCPStore

        stacks.listen()
        talk_over(ray.util.get_node_ip_address(), os.environ)
        engine = importlib.import_module(ENGINE)
        model = importlib.import_module("rlkd.engines.model").ModelOptions(**options["model"])
        made = engine.RankOptions(**{**options, "model": model})
        if self._store is None:
            host, _, port = store.rpartition(":")
            self._store = TCPStore(host, int(port), self.ranks, timeout=timedelta(seconds=STORE_S))
        self._engine = engine.Rank(algorithm, made, engine.Place(self.rank, self.ranks, self._store))
        if self.rank == 0:
            self._publisher = importlib.import_module("rlkd.engines.weights").Publisher(self._weights_directory)

    def update(self, mine: Sequence[MicroBatch], knobs: Knobs) -> Shares:
        shares: Shares = self._engine.update(mine, knobs)
        return shares

    def publish(self, version: int) -> WeightRef | None:
        """Rank 0: put the weights where the samplers find them. The others take part in gathering them."""
        if self._publisher is None:
            for _ in self._engine.weights():
                continue
            return None
        ref: WeightRef = self._publisher.publish(version, self._engine.weights())
        return replace(ref, node=ray.get_runtime_context().get_node_id())

    def save(self, path: str) -> dict[str, str]:
        """Write this rank's part; digests of its components."""
        digests: dict[str, str] = self._engine.save(path)
        return digests

    def load(self, path: str) -> dict[str, str]:
        """Digests of the components that must be those of the save: all of them with the same ranks and stage."""
        digests: dict[str, str] = self._engine.load(path)
        return digests

    def export(self, path: str) -> None:
        """A Hugging Face folder, and probe.json beside it: log-probs to compare a copy with."""
        self._engine.export(path)
        probe = self._engine.probe()
        if self.rank == 0:
            (Path(path).parent / "probe.json").write_text(json.dumps(probe))

    def close(self) -> None:
        """Remove what was published."""
        if self._publisher is not None:
            self._publisher.close()

    def probe(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._engine.probe()
        return found

    def place(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"pid": os.getpid(), "host": socket.gethostname(), "node": node}


class LearnerGroup:
    """All ranks, as the loop sees them. A rank that dies or does not answer in time is LearnerLost: the others cannot
    go on without it."""

    def __init__(
        self,
        ranks: int,
        spawn: Callable[[int], Any],
        options: Mapping[str, Any],
        algorithm: Algorithm,
        deliver: Callable[[WeightRef], Awaitable[None]],
        end: Callable[[Any], None] = ray.kill,
        withdraw: Callable[[], None] = lambda: None,
        seated: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`spawn(rank)` makes an actor of LearnerRank, `end` kills one; `deliver` gives weights to every sampler,
        `withdraw` says that what was delivered last is no longer there for new ones. `seated` returns when there is a
        place for every rank, and is asked before they are made."""
        self._ranks, self._spawn, self._options, self._algorithm = ranks, spawn, options, algorithm
        self._deliver, self._end, self._withdraw, self._seated = deliver, end, withdraw, seated
        self._actors: list[Any] = []
        self._places: list[dict[str, Any]] = []

    @property
    def ranks(self) -> int:
        return self._ranks

    @property
    def actors(self) -> tuple[Any, ...]:
        """The ranks' handles; none while they are lost."""
        return tuple(self._actors)

    async def start(self) -> None:
        """New ranks, as at the very start: nothing is left of others that there were."""
        self.kill()
        self._withdraw()  # new ranks remove what the old ones published
        if self._seated is not None:
            await self._seated()
        self._actors = [self._spawn(rank) for rank in range(self._ranks)]
        self._places = await self._all("place", START_S, *[()] * self._ranks)
        store = await self._one(0, "open_store", START_S)
        await self._all("start", START_S, *[(store, self._options, self._algorithm)] * self._ranks)

    def roster(self) -> dict[str, dict[str, Any]]:
        """Where the ranks are, by name (workers/roster.py)."""
        state = "is there" if self._actors else "was lost"
        return {f"learner-{rank}": {**place, "state": state} for rank, place in enumerate(self._places)}

    async def update(self, batch: list[list[MicroBatch]], knobs: Knobs) -> Mapping[str, float]:
        columns = [([turn[rank] for turn in batch], knobs) for rank in range(self._ranks)]
        shares: list[Shares] = await self._all("update", self._timeout_s, *columns)
        merged = Shares.merged(shares)
        return {**merged, **effective_sample_size(merged)}

    async def publish(self, version: int) -> None:
        refs = await self._all("publish", self._timeout_s, *[(version,)] * self._ranks, fatal=self._gathers)
        await self._deliver(refs[0])

    async def save(self, path: str) -> Mapping[str, str]:
        """Digests by `rank-0/weights`, …. SaveFailed if a rank could not write."""
        return self._named(await self._written("save", path))

    async def load(self, path: str) -> Mapping[str, str]:
        return self._named(await self._all("load", self._timeout_s, *[(os.path.abspath(path),)] * self._ranks))

    async def export(self, path: str) -> None:
        await self._written("export", path)

    async def _written(self, method: str, path: str) -> list[Any]:
        """The ranks write something, and can go on if that fails: unless they wait for each other in it (export)."""
        calls, together = [(os.path.abspath(path),)] * self._ranks, method == "export" and self._gathers
        try:
            return await self._all(method, self._timeout_s, *calls, fatal=together)
        except RayTaskError as error:
            cause = f"{method}: {type(error.cause).__name__}: {error.cause}"
            raise (LearnerLost if together else SaveFailed)(cause) from error

    def _named(self, digests: Sequence[Mapping[str, str]]) -> dict[str, str]:
        return {f"rank-{rank}/{part}": digest for rank, d in enumerate(digests) for part, digest in d.items()}

    async def probe(self) -> Mapping[str, Any]:
        """Tokens, and the log-probs that the policy gives them now (engines/deepspeed.py)."""
        calls: list[tuple[Any, ...]] = [()] * self._ranks
        answers: list[Mapping[str, Any]] = await self._all("probe", self._timeout_s, *calls, fatal=self._gathers)
        return answers[0]

    async def rebuild(self) -> None:
        """In the place of lost ones."""
        await self.start()

    async def finish(self) -> None:
        """Remove the published weights and end the actors."""
        if self._actors:
            with suppress(LearnerLost):  # it is gone already; its files go with the run's weights directory
                await self._one(0, "close", CLOSE_S)
        self.kill()

    def kill(self) -> None:
        for actor in self._actors:
            self._end(actor)
        self._actors = []

    @property
    def _gathers(self) -> bool:
        """Whether ranks wait for each other to put weights together: an error of one leaves the others hanging."""
        return self._ranks > 1 and self._options.get("zero_stage") == 3

    @property
    def _timeout_s(self) -> float:
        return float(self._options["timeout_s"])

    async def _all(self, method: str, timeout_s: float, *arguments: tuple[Any, ...], fatal: bool = True) -> list[Any]:
        """Call every rank at once. The first error ends all ranks: without one the others hang in a collective.
        With `fatal=False`, and where there is only one, only the loss of a rank does."""
        calls = [asyncio.ensure_future(self._one(r, method, timeout_s, *a)) for r, a in enumerate(arguments)]
        try:
            return list(await asyncio.gather(*calls))
        except Exception as error:
            cause = await _cause(error, calls)
            if (fatal and self._ranks > 1) or isinstance(cause, LearnerLost):
                self.kill()
            if cause is error:
                raise
            raise cause from error
        finally:
            for call in calls:
                call.cancel()

    async def _one(self, rank: int, method: str, timeout_s: float, *arguments: Any) -> Any:
        name = f"learner-{rank}.{method}"
        if not self._actors:
            raise LearnerLost(f"{name}: the learner was stopped")
        try:
            return await call(self._actors[rank], name, timeout_s, method, *arguments)
        except WorkerLost as e:
            raise LearnerLost(str(e)) from e


async def _cause(first: Exception, calls: Sequence["asyncio.Future[Any]"]) -> Exception:
    """A rank that dies shows at the others first, as a broken connection: wait a little for the error behind it."""
    if isinstance(first, RlkdError | LearnerLost):
        return first
    done, _ = await asyncio.wait(calls, timeout=CAUSE_S)
    errors = [e for call in done if not call.cancelled() and (e := call.exception()) is not None]
    known = [e for e in errors if isinstance(e, RlkdError | LearnerLost)]
    return known[0] if known else first


def spawner(
    ranks: int, weights_directory: str, environment: Mapping[str, str], actor: Callable[[int], Mapping[str, Any]]
) -> Callable[[int], Any]:
    """What a LearnerGroup makes actors with; `actor(rank)` gives Ray options, `environment` is set before imports."""

    def spawn(rank: int) -> Any:
        settings = {**actor(rank), "max_restarts": 0, "max_task_retries": 0}
        settings["runtime_env"] = {"env_vars": dict(environment)}
        return ray.remote(LearnerRank).options(**settings).remote(rank, ranks, weights_directory)

    return spawn
