"""One call to one worker on Ray: with a name, a deadline, and one meaning for everything that can go wrong."""

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from rlkd.core.errors import InfrastructureError, RlkdError, WorkerLost
from rlkd.workers.losses import Losses, Progress
from rlkd.workers.vitals import Place, Vitals

FULL = (ObjectStoreFullError, OutOfDiskError)
FULL_WAITS_S = (1.0, 2.0, 4.0)  # before a call that found Ray's object store full is sent again


@dataclass(eq=False)
class Slot:
    """A place for a worker: the name stays, the worker may change."""

    index: int
    name: str
    handle: Any = None
    ready: bool = False
    state: str = "not started"  # in words, for people who wait
    load: int = 0  # samples or tokens under way
    calls: int = 0
    homeless: bool = False  # the cluster has no room for it (yet)
    loading: bool = False  # weights: it writes nothing meanwhile
    leaving: bool = False  # its node goes away: it finishes what it has, another slot has its place
    out: str | None = None  # why no more workers are made here
    made: int = 0  # workers so far
    losses: Losses = field(default_factory=Losses)
    progress: Progress = field(default_factory=Progress)  # of this worker
    place: Place | None = None
    vitals: Vitals | None = None  # its last sign of life
    lost: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


async def ask(slot: Slot, handle: Any, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
    """Call a slot's worker. WorkerLost as `call`, and if it is given up by somebody else meanwhile."""
    if handle is None:
        raise WorkerLost(f"{slot.name}.{what}: it was lost just before")
    return await call(handle, f"{slot.name}.{what}", timeout_s, method, *arguments, lost=slot.lost)


async def call(
    handle: Any, name: str, timeout_s: float, method: str, *arguments: Any, lost: "asyncio.Future[None] | None" = None
) -> Any:
    """Call an actor. WorkerLost (called `name`) if it dies, does not answer in time, or once `lost` has an error.

    An RlkdError that it raises is raised here as it was; any other error of its own code as Ray's RayTaskError.
    InfrastructureError when Ray's object store and its disk are full, for arguments after a few tries.
    """
    ref = await _sent(handle, name, method, arguments)
    answer = asyncio.ensure_future(ref)
    try:
        await asyncio.wait({answer, *([lost] if lost else [])}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        _give_up(ref)
        answer.cancel()
        raise
    if not answer.done():
        answer.cancel()
        why = _reason(lost) if lost is not None and lost.done() else f"no answer within {timeout_s:g} s"
        raise WorkerLost(f"{name}: {why}")
    try:
        return answer.result()
    except FULL as error:
        raise _full(name, arguments, error) from error
    except RayTaskError as error:  # raised by the worker's own code
        if isinstance(error.cause, FULL):
            raise _full(name, arguments, error.cause) from error
        if isinstance(error.cause, WorkerLost):
            raise WorkerLost(f"{name}: {error.cause}") from error
        if isinstance(error.cause, RlkdError):
            raise error.cause from None
        raise
    except RayError as error:  # the worker, its process, node or object store is gone
        raise WorkerLost(f"{name}: {type(error).__name__}: {_said(error)}") from error
    except WorkerLost as error:
        raise WorkerLost(f"{name}: {error}") from error


async def _sent(handle: Any, name: str, method: str, arguments: tuple[Any, ...]) -> Any:
    """The call on its way. Nothing has run when its arguments find no room: then it may be sent again."""
    for wait_s in (*FULL_WAITS_S, None):
        try:
            return getattr(handle, method).remote(*arguments)
        except FULL as error:
            if wait_s is None:
                raise _full(name, arguments, error) from error
            await asyncio.sleep(wait_s)  # what is under way may end and leave room
    raise AssertionError("not reached")


def _full(name: str, arguments: tuple[Any, ...], error: Exception) -> InfrastructureError:
    sent = len(ray.cloudpickle.dumps(arguments)) / 2**20
    disk = shutil.disk_usage(tempfile.gettempdir())
    store = ray.cluster_resources().get("object_store_memory") if ray.is_initialized() else None
    size = "of unknown size" if store is None else f"of {store / 2**20:.0f} MiB"
    return InfrastructureError(
        "RLKD-I615",
        f"{name}: no room for a call of {sent:.1f} MiB: Ray's object store {size} is full and cannot spill to disk "
        f"({type(error).__name__}; {disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free on its disk)",
        where="ray.object_store_gib",
        fix="free space on that disk, or raise ray.object_store_gib; `ray memory` lists what is in the store",
    )


def _said(error: RayError) -> str:
    """The telling line of Ray's long messages: why an actor is dead, if it says so."""
    lines = str(error).strip().splitlines() or [""]
    telling = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    for guess in (" Some common causes include", " There are some potential root causes"):
        telling = telling.split(guess)[0]
    return telling[:300]


def _reason(lost: "asyncio.Future[None]") -> str:
    return str(lost.exception())


def _give_up(ref: Any) -> None:
    """Nobody waits for this any more: have the worker stop it."""
    if isinstance(ref, ray.ObjectRef):
        ray.cancel(ref)
