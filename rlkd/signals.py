"""Ctrl-C and SIGTERM, from a run's first line to its last.

    once       save and end (exit 75); where nothing is trained yet, end at once (75 too: the same command goes on)
    Ctrl-C twice        end without saving (130): the last checkpoint stands
    Ctrl-C three times  kill everything this process started, and itself
    SIGTERM any number  as once: Kubernetes and Ray may send it again

The handlers are Python's own and not the event loop's: they also run while the loop is busy. `ray.init` puts one of its
own in the place of ours, so that they are installed again after it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil

from rlkd.core.errors import INTERRUPTED
from rlkd.core.stop import Stop, StopRequest

NUMBERS = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopNow(KeyboardInterrupt):
    """Raised in the main thread where there is nothing to save."""


class Signals:
    """Asks `stop`, within the context. `grace_s`: seconds from SIGTERM until the platform kills (None: unknown).
    `last` is called before the process ends without saving. In a thread other than the main one it does nothing."""

    def __init__(self, stop: Stop, grace_s: float | None = None, last: Callable[[], None] = lambda: None) -> None:
        self.stop, self.grace_s, self.last = stop, grace_s, last
        self._before: dict[int, Any] = {}
        self._interruptible = self._ending = False
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Signals":
        if self._main:
            self._before = {number: signal.getsignal(number) for number in NUMBERS}
        self.install()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the handlers; again, if somebody else did. Only from the main thread."""
        if self._main:
            for number in NUMBERS:
                if signal.getsignal(number) != self._asked:
                    signal.signal(number, self._asked)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it a request raises StopNow, wherever the main thread is: nothing is lost by that here."""
        self._interruptible = True
        try:
            if self.stop.is_set():
                raise StopNow
            yield
        finally:
            self._interruptible = False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        signal.alarm(0)  # in the middle of `ray.init` Ray's C++ handler was first: it would abort the process in 3 s
        if number == signal.SIGINT and self.stop.is_set():
            self._without_saving()
        elif not self.stop.is_set():
            left = self.grace_s if number == signal.SIGTERM else None
            deadline = None if left is None else time.monotonic() + left
            self.stop.ask(StopRequest("user" if number == signal.SIGINT else "signal", NAMES[number], deadline))  # type: ignore[index]
        if self._interruptible:
            raise StopNow

    def _without_saving(self) -> None:
        if self._ending:  # even that took too long
            kill_all()
        self._ending = True
        _say(f"stopped without saving: the last checkpoint stands (exit {INTERRUPTED})")
        try:
            self.last()
        finally:
            os._exit(INTERRUPTED)


def kill_all() -> None:
    """SIGKILL to everything this process started, and to itself."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os.kill(os.getpid(), signal.SIGKILL)


def grace_of_platform(configured: float | None) -> float | None:
    """Seconds between SIGTERM and SIGKILL: what the recipe says, else what a Ray job was told."""
    told = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "")
    return configured if configured is not None or not told.isdecimal() else float(told)


def _say(text: str) -> None:
    """To stderr past Python's buffers, which a signal may have interrupted."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:
        return
