"""From a request to stop to the end of the run: a start that can be broken off, what is said, which error it is."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from rlkd import export as exported
from rlkd.core.errors import RESUBMIT, InfrastructureError, LearnerLost, Stopped, WorkerLost
from rlkd.core.stop import Stop, StopRequest
from rlkd.signals import Signals, StopNow

Result = TypeVar("Result")
LOOK_S = 0.2


async def started(starting: Coroutine[Any, Any, Result], stop: Stop, signals: Signals) -> Result:
    """The result of what is starting. StopNow as soon as somebody asks to stop: what was started is ended.

    Ray takes the SIGTERM handler in `ray.init`: it is taken back here.
    """
    task, asked = asyncio.ensure_future(starting), asyncio.ensure_future(stop.wait())
    try:
        while not task.done() and not asked.done():
            await asyncio.wait({task, asked}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            signals.install()
        if task.done():
            return task.result()
        raise StopNow
    finally:
        for one in (task, asked):
            one.cancel()
        await asyncio.gather(task, asked, return_exceptions=True)


@contextmanager
def translated(directory: Path, stop: Stop) -> Iterator[None]:
    """What ends a run, as one of the errors of core/errors.py."""
    try:
        yield
    except SystemExit as ray_said:  # by Ray's own handler, in the moments before ours is back
        if ray_said.code != signal.SIGTERM:
            raise
        stop.ask(StopRequest("signal", "SIGTERM"))
        raise Stopped(RESUBMIT, nothing_new(directory, stop)) from None
    except StopNow:
        raise Stopped(RESUBMIT, nothing_new(directory, stop)) from None
    except (LearnerLost, WorkerLost) as lost:
        raise InfrastructureError(
            "RLKD-I003",
            f"the run lost {lost}",
            where=str(directory),
            fix="the same command continues from the last checkpoint; Ray's logs say why the process ended",
        ) from lost


def nothing_new(directory: Path, stop: Stop) -> str:
    """What to tell where this attempt has trained nothing yet."""
    saved = max(exported.checkpoints(directory), default=None)
    kept = "nothing to save" if saved is None else f"nothing new to save, the checkpoint of step {saved} stands"
    who = stop.request.text if stop.request is not None else "stopped"
    return f"{who}: {kept}; the same command {'starts again' if saved is None else 'goes on there'}"


@asynccontextmanager
async def announced(stop: Stop, saving: Callable[[], str], tell: Callable[..., None]) -> AsyncIterator[None]:
    """Within it a request to stop is told as soon as it comes; `saving` says what will take how long."""

    async def wait() -> None:
        request = await stop.wait()
        tell("stopping", f"{request.text}: {saving()}; press Ctrl-C {_again(request)}to stop without saving")

    task = asyncio.create_task(wait(), name="stop announced")
    try:
        yield
    finally:
        if stop.is_set():
            await asyncio.sleep(0)  # an error that came at once must not leave it unsaid
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def saving(step: int | None, save_s: float | None) -> str:
    """What a request to stop leads to."""
    took = "" if save_s is None else f" (about {save_s:.0f} s)"
    return f"saving step {step}{took}" if step else "nothing is trained yet"


def _again(request: StopRequest) -> str:
    return "again " if request.kind == "user" else ""
