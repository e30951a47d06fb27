"""Ctrl-C and SIGTERM for a whole sweep: every trial saves and ends, then the driver does. The same command goes on."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlkd.core.errors import RESUBMIT, Stopped
from rlkd.lease import holder
from rlkd.signals import StopNow
from rlkd.sweep.trial import STOP

SAVE_S = 120.0  # for all trials together
LOOK_S = 0.2


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Within it the first signal lets the trials save, for 120 s at most; a second one does not wait. Then Stopped."""
    asked: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            (folder / STOP).touch()
            _say("stopping: the trials save; press Ctrl-C again not to wait for them")
            until = time.monotonic() + SAVE_S
            while running(folder) and time.monotonic() < until:
                time.sleep(LOOK_S)  # a second signal is heard in here, and raises
        raise StopNow  # no Exception: Tune catches those

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:  # StopNow, of which Ray makes a plain one where it waits
        if not asked:
            raise
        left = running(folder)
        kept = f"{', '.join(left)} did not save; their last checkpoints stand" if left else "every trial has saved"
        raise Stopped(RESUBMIT, f"{kept}; the same command goes on") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def running(folder: Path) -> list[str]:
    """Names of the trials whose runs a process holds."""
    found = [path.parent for path in folder.glob("runs/*/.lease")]
    return sorted(run.name for run in found if (other := holder(run)) is not None and other.alive() is not False)


def _say(text: str) -> None:
    try:
        os.write(sys.stderr.fileno(), f"{text}\n".encode())
    except OSError:
        return
