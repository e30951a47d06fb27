"""Weights to nodes that do not share memory or a disk with the learner's, through Ray's object store.

A porter is an actor on a node: the one beside the learner reads the version that was published there and puts it, in
pieces, into the object store; the others take the pieces out and write the same version down in their own shared
memory. All workers of a node map that one copy, and check its digest before they use it.

The object store holds a few pieces at a time, never a whole version. A piece that several nodes want at once is put in
once; Ray passes it on from whichever node has it.
"""

import asyncio
import importlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlkd.core.errors import RlkdError, WorkerLost
from rlkd.core.faults import fault
from rlkd.core.ports import WeightRef
from rlkd.workers import stacks
from rlkd.workers.ask import call

PIECE = 16 * 2**20  # bytes
AHEAD = 3  # pieces that a porter has asked for and not yet taken
HELD = 6  # pieces that the porter beside the learner keeps in the object store
PIECE_S = 60.0  # for one piece
ANSWER_S, CLOSE_S = 10.0, 5.0
TRIES = 2  # a porter may be lost too


class Porter:
    """The actor of one node."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._publisher: Any = None
        self._held: OrderedDict[tuple[str, str, int], ray.ObjectRef[Any]] = OrderedDict()
        stacks.listen()

    def contents(self, ref: WeightRef) -> tuple[Sequence[Mapping[str, Any]], int]:
        """The tensors of a version that was published on this node, and its bytes."""
        self._held = OrderedDict((key, held) for key, held in self._held.items() if key[1] == ref.digest)
        found: tuple[Sequence[Mapping[str, Any]], int] = _weights().contents(ref)
        return found

    def piece(self, ref: WeightRef, start: int) -> list[Any]:
        """A reference to a piece, in a list: Ray would pass the bytes on. InfrastructureError if it was overwritten."""
        key = (ref.where, ref.digest, start)
        if key not in self._held:
            self._held[key] = ray.put(_weights().piece(ref, start, PIECE))
            _weights().there(ref)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return [self._held[key]]

    def let_go(self) -> None:
        """Nobody wants more for now."""
        self._held.clear()

    def land(self, ref: WeightRef, source: Any) -> tuple[WeightRef, int]:
        """Bring a version here from the porter `source` of its node; where it is now, and how many bytes came.
        InfrastructureError if it is not there any more, WorkerLost if the other porter is not."""
        fault("porter.land")
        if self._publisher is None:
            self._publisher = _weights().Publisher(self._directory)
        try:
            tensors, size = ray.get(source.contents.remote(ref), timeout=PIECE_S)
            return self._publisher.land(ref, tensors, _pieces(ref, source, size)), size
        except RayTaskError as error:
            if isinstance(error.cause, RlkdError):
                raise error.cause from None
            raise WorkerLost(
                f"the porter of node {ref.node[:8]}: {type(error.cause).__name__}: {error.cause}"
            ) from None
        except RayError as error:
            raise WorkerLost(f"the porter of node {ref.node[:8]}: {type(error).__name__}") from None

    def close(self) -> None:
        """Remove what was written down here."""
        if self._publisher is not None:
            self._publisher.close()
            with suppress(OSError):  # another node on this machine uses it too
                Path(self._directory).rmdir()


def _pieces(ref: WeightRef, source: Any, size: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a version with their offsets; some are on their way while one is written down."""
    starts = range(0, size, PIECE)
    coming = deque(source.piece.remote(ref, start) for start in starts[:AHEAD])
    for number, start in enumerate(starts):
        (held,) = ray.get(coming.popleft(), timeout=PIECE_S)
        if number + AHEAD < len(starts):
            coming.append(source.piece.remote(ref, starts[number + AHEAD]))
        yield start, memoryview(ray.get(held, timeout=PIECE_S))


def _weights() -> Any:
    return importlib.import_module("rlkd.engines.weights")


class Carrier:
    """The driver's side: brings a version to a node once, however many workers there want it."""

    def __init__(
        self,
        make: Callable[[str], Any],
        timeout_s: float,
        always: bool = False,
        end: Callable[[Any], None] = ray.kill,
    ) -> None:
        """`make(node)` gives an actor of Porter there. `always`: also to the learner's own node, as if it were another
        one."""
        self._make, self._timeout_s, self._always, self._end = make, timeout_s, always, end
        self._porters: dict[str, Any] = {}
        self._brought: dict[str, tuple[WeightRef, asyncio.Task[WeightRef]]] = {}
        self.bytes, self.times = 0, 0  # that went from node to node, since the start

    async def bring(self, ref: WeightRef, node: str) -> WeightRef:
        """The same version for workers of this node. WorkerLost if it cannot be brought, InfrastructureError if it has
        been overwritten meanwhile."""
        if not ref.node or (ref.node == node and not self._always):
            return ref
        known = self._brought.get(node)
        if known is None or known[0] != ref or _failed(known[1]):
            before = None if known is None else known[1]
            known = ref, asyncio.create_task(self._carry(ref, node, before), name=f"weights to {node[:8]}")
            self._brought[node] = known
        return await asyncio.shield(known[1])

    async def close(self) -> None:
        """Remove what lies on the nodes, and end the porters."""
        for _, task in self._brought.values():
            task.cancel()
        await asyncio.gather(*(self._closed(node) for node in list(self._porters)))

    async def _closed(self, node: str) -> None:
        porter = self._porters.pop(node)
        try:
            await call(porter, f"porter {node[:8]}.close()", CLOSE_S, "close")
        except WorkerLost:
            return  # with its node; or the next run of this name on it removes what is left
        finally:
            self._end(porter)

    async def _carry(self, ref: WeightRef, node: str, before: "asyncio.Task[WeightRef] | None") -> WeightRef:
        if before is not None:  # one at a time on a node
            await asyncio.wait({before})
        for left in range(TRIES - 1, -1, -1):
            source, porter = self._porter(ref.node), self._porter(node, source=False)
            try:
                what = f"weights of version {ref.version} to node {node[:8]}"
                landed, size = await call(porter, what, self._timeout_s, "land", ref, source)
            except WorkerLost:
                self._drop(node)
                await self._look_at_source(ref.node)
                if not left:
                    raise
            else:
                self.bytes, self.times = self.bytes + size, self.times + 1
                if all(task.done() for other, (_, task) in self._brought.items() if other != node):
                    source.let_go.remote()
                found: WeightRef = landed
                return found
        raise AssertionError("not reached")

    def _porter(self, node: str, source: bool = True) -> Any:
        """Of the node, made if there is none. The one that reads beside the learner is another one than the one that
        writes there, or with `always` it would wait for itself."""
        key = f"{node}/source" if source else node
        if key not in self._porters:
            self._porters[key] = self._make(node)
        return self._porters[key]

    def _drop(self, key: str) -> None:
        if key in self._porters:
            self._end(self._porters.pop(key))

    async def _look_at_source(self, node: str) -> None:
        """Another one in its place, if it was this one that was lost."""
        key = f"{node}/source"
        if key not in self._porters:
            return
        try:
            await call(self._porters[key], f"porter of node {node[:8]}.let_go()", ANSWER_S, "let_go")
        except WorkerLost:
            self._drop(key)


def _failed(task: "asyncio.Task[WeightRef]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def porters(directory: str, environment: Mapping[str, str]) -> Callable[[str], Any]:
    """What a Carrier makes its actors with. `directory`, in every node's shared memory, is where copies lie."""

    def make(node: str) -> Any:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": there}
        options["runtime_env"] = {"env_vars": dict(environment)}
        return ray.remote(Porter).options(**options).remote(directory)

    return make
