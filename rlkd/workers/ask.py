"""One call to one worker on Ray: with a name, a deadline, and one meaning for everything that can go wrong."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rlkd.core.errors import RlkdError, WorkerLost


@dataclass(eq=False)
class Slot:
    """A place for a worker: the name stays, the worker may change."""

    index: int
    name: str
    handle: Any = None
    ready: bool = False
    load: int = 0  # samples or tokens under way
    calls: int = 0
    failures: int = 0  # lost workers since the last answer
    lost: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


async def ask(slot: Slot, handle: Any, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
    """Call a slot's worker. WorkerLost as `call`, and if it is given up by somebody else meanwhile."""
    return await call(handle, f"{slot.name}.{what}", timeout_s, method, *arguments, lost=slot.lost)


async def call(
    handle: Any, name: str, timeout_s: float, method: str, *arguments: Any, lost: "asyncio.Future[None] | None" = None
) -> Any:
    """Call an actor. WorkerLost (called `name`) if it dies, does not answer in time, or once `lost` has an error.

    An RlkdError that it raises is raised here as it was; any other error of its own code as Ray's RayTaskError.
    """
    ref = getattr(handle, method).remote(*arguments)
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
    except RayTaskError as error:  # raised by the worker's own code
        if isinstance(error.cause, WorkerLost):
            raise WorkerLost(f"{name}: {error.cause}") from error
        if isinstance(error.cause, RlkdError):
            raise error.cause from None
        raise
    except RayError as error:  # the worker, its process, node or object store is gone
        raise WorkerLost(f"{name}: {type(error).__name__}: {_said(error)}") from error
    except WorkerLost as error:
        raise WorkerLost(f"{name}: {error}") from error


def _said(error: RayError) -> str:
    """The telling line of Ray's long messages: why an actor is dead, if it says so."""
    lines = str(error).strip().splitlines() or [""]
    telling = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return telling.split(" Some common causes include")[0][:300]


def _reason(lost: "asyncio.Future[None]") -> str:
    return str(lost.exception())


def _give_up(ref: Any) -> None:
    """Nobody waits for this any more: have the worker stop it."""
    if isinstance(ref, ray.ObjectRef):
        ray.cancel(ref)
