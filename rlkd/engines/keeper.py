"""The worker's side of the keeper: start it, have it fork children and end them, start it anew if it is lost."""

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlkd.core.errors import DataError, PreflightError, Problem

ANSWER_S = 30.0  # for a fork or a kill; they take milliseconds
_START = (
    "import pickle, sys; setup = pickle.load(sys.stdin.buffer); sys.path[:] = setup['path']; "
    "from rlkd.engines.jailed import main; main(setup)"
)
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class JailClosed(RuntimeError):
    """The jail was closed while something was being judged."""


class _Lost(Exception):
    """The keeper does not answer."""


@dataclass(frozen=True)
class Child:
    """One forked child: where to talk to it, and what tells that it is gone."""

    pid: int
    keeper: int  # the pid of the keeper that forked it
    channel: socket.socket  # requests and replies
    output: int  # a file descriptor: what it prints
    alive: int  # a pidfd: readable once it has ended

    def release(self) -> None:
        self.channel.close()
        os.close(self.output)
        os.close(self.alive)


class Keeper:
    """A keeper process with the rewards loaded. Thread-safe; every wait is bounded."""

    def __init__(self, rewards: bytes, load: str, memory: int, start_s: float, code: Mapping[str, Any]) -> None:
        """`code`: min_tier and accept_unsafe_code, for rewards that run code."""
        self.names: tuple[str, ...] = ()
        self.standing: Mapping[str, Any] | None = None  # where such rewards run it; None: there are none
        self._setup = {"rewards": rewards, "load": load, "memory": memory, **code}
        self._start_s = start_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self) -> None:
        """Starts the process unless it runs. DataError if the rewards cannot be loaded in it; PreflightError if they
        need a better sandbox than this machine has."""
        with self._lock:
            if self._process is None:
                self._start()

    def fork(self) -> Child:
        """A new child. A lost keeper is replaced once; DataError if its successor does not come up."""
        with self._lock:
            for attempt in range(2):
                if self._process is None:
                    self._start()
                try:
                    return self._fork()
                except _Lost as e:
                    self._discard()
                    if attempt == 1:
                        raise DataError(
                            "RLKD-D303",
                            f"the process that keeps the rewards was lost twice while starting a child: {e}",
                            fix="is the machine out of memory or processes? See its kernel log (dmesg)",
                        ) from None
            raise AssertionError("not reached")

    def end(self, child: Child) -> int | None:
        """Kills a child with all it started, and returns its exit code or minus its signal; None if that got lost."""
        status: int | None = None
        with self._lock:
            if self._process is not None and self._process.pid == child.keeper:
                try:
                    status = self._ask({"do": "end", "pid": child.pid})["done"]
                except _Lost:
                    self._discard()
        child.release()
        return status

    def close(self) -> None:
        """Ends the keeper and with it every child. What waits for a child sees it gone."""
        self._closed = True
        with self._lock:
            self._discard()

    def _start(self) -> None:
        if self._closed:
            raise JailClosed
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setup = {**self._setup, "control": theirs.fileno(), "parent": os.getpid()}
        setup["path"] = [os.path.abspath(p) for p in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=2,  # what rewards print while they are imported; a command's own output stays clean
            pass_fds=[theirs.fileno()],
            env={**os.environ, **_THREADS},
        )
        theirs.close()
        self._control = ours
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then it says nothing either, below
            self._process.stdin.write(pickle.dumps(setup))
            self._process.stdin.close()
        try:
            said = self._receive(self._start_s)
        except _Lost as e:
            self._process.kill()  # it may hang in an import, where it does not see that it should go
            self._discard()
            raise self._not_loaded(str(e)) from None
        if "refused" in said:
            self._discard()
            raise PreflightError.of([Problem(**said["refused"])])
        if "failed" in said:
            self._discard()
            raise self._not_loaded(said["failed"])
        self.names, self.standing = tuple(said["ready"]), said["standing"]

    @staticmethod
    def _not_loaded(why: str) -> DataError:
        fix = "import the reward's file in a fresh python to see it alone; heavy imports belong into `prepare`"
        return DataError("RLKD-D303", f"the rewards could not be loaded in the verifier's process:\n{why}", fix=fix)

    def _fork(self) -> Child:
        assert self._process is not None
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            pid = self._ask({"do": "fork"}, [theirs.fileno(), writing])["done"]
            return Child(pid, self._process.pid, ours, reading, os.pidfd_open(pid))
        except (_Lost, OSError) as e:
            ours.close()
            os.close(reading)
            raise _Lost(str(e)) from e
        finally:
            theirs.close()
            os.close(writing)

    def _ask(self, request: Mapping[str, Any], descriptors: list[int] | None = None) -> dict[str, Any]:
        assert self._control is not None
        self._control.settimeout(ANSWER_S)
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors or [])
        except OSError as e:
            raise _Lost(f"the keeper is gone: {e}") from e
        return self._receive(ANSWER_S)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self._control is not None
        self._control.settimeout(timeout_s)
        try:
            message = self._control.recv(1 << 18)
        except TimeoutError:
            raise _Lost(f"nothing came of it in {timeout_s:g} s") from None
        except OSError as e:
            raise _Lost(f"the keeper is gone: {e}") from e
        if not message:
            raise _Lost("its process ended without a word")
        said: dict[str, Any] = json.loads(message)
        return said

    def _discard(self) -> None:
        """End of file on the control socket makes the keeper end its children and go; if it does not, it is killed."""
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if process is not None:
            try:
                process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
