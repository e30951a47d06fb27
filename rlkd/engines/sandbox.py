"""The sandbox: untrusted code in a process that can reach nothing, and how much of that this machine gives.

Tiers, weakest first; rlkd says which it has and never more:

    none              the code runs in the trainer's process. rlkd never does that.
    process           a process of its own with limits, an empty environment and no descriptors, ended from outside.
                      It has the user's files and network.
    userns+landlock   besides, namespaces for users, processes, network, mounts and IPC, an empty root, Landlock and
                      seccomp. What is left is the kernel itself.
    container         another machine or virtual machine. rlkd has no such tier; run the reward workers on a node
                      that has nothing to lose.

`python -m rlkd.engines.sandbox` says in one line of JSON what this machine gives.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import struct
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from rlkd.engines import sandbox_filter, sandbox_kernel
from rlkd.engines.sandbox_room import Room, enter, map_users

START_S = 20.0  # until Python runs inside, on a busy machine; it takes some 40 ms
GRACE_S = 2.0  # beyond a limit that process 1 keeps itself
LARGEST = 1 << 27  # bytes of a message from inside
_LENGTH = struct.Struct(">I")


class Tier(StrEnum):
    """How well code is kept in; see the file's head."""

    NONE = "none"
    PROCESS = "process"
    SANDBOX = "userns+landlock"

    @property
    def rank(self) -> int:
        return list(Tier).index(self)


@dataclass(frozen=True)
class Found:
    """What this machine gives, and why it is not more."""

    tier: Tier
    reason: str = ""  # why it is not the highest
    landlock: int = 0  # the kernel's ABI


class SandboxError(RuntimeError):
    """The sandbox itself does not work; says nothing about the code that was to run in it."""


@dataclass(frozen=True)
class Ran:
    """A program's end. `code` is None if it was ended: out of time, or too much output."""

    stdout: str
    stderr: str
    code: int | None
    overflow: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Tested:
    """A test's verdict: `how` is passed, failed, raised, answer (it does not load), ended, timeout."""

    passed: bool
    how: str
    detail: str = ""
    seconds: float = 0.0


class Session:
    """One sandbox with one source in it: a context manager. Not thread-safe."""

    def __init__(self, source: str, room: Room) -> None:
        self._source, self._room = source, room
        self._home: str | None = None
        self._channel: socket.socket | None = None
        self._outer = self._inner = 0
        self._received = b""

    def __enter__(self) -> "Session":
        try:
            self._start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    @property
    def alive(self) -> bool:
        return self._channel is not None

    def program(self, stdin: str, limit_s: float, most: int = 1 << 20) -> Ran:
        """Runs the source as a program. `most`: bytes of output, after which it is ended."""
        self._send({"do": "program", "stdin": stdin, "limit_s": limit_s, "most": most})
        said = self._receive(limit_s + GRACE_S)
        if said is None:
            return Ran("", "the sandbox ended", None)
        return Ran(said["stdout"], said["stderr"], said["code"], said["overflow"], said["seconds"])

    def test(self, before: str, test: str, limit_s: float) -> Tested:
        """Runs `before` and then `test` on the names that the source defines. Passed if nothing is raised."""
        nonce = secrets.token_hex(16)
        self._send({"do": "test", "limit_s": limit_s})
        self._send({"before": before, "test": test, "nonce": nonce})
        verdict: dict[str, Any] | None = None
        said = self._receive(limit_s + GRACE_S)
        if said is not None and said.get("nonce") == nonce:
            verdict, said = said, self._receive(limit_s + GRACE_S)
        if said is None:
            return Tested(False, "ended", "the sandbox ended")
        if verdict is None:
            how = "ended" if said["ended"] else "timeout"
            return Tested(False, how, f"no verdict within {limit_s:g} s", said["seconds"])
        return Tested(bool(verdict["passed"]), verdict["how"], verdict["detail"], said["seconds"])

    def kill(self) -> None:
        """Ends everything in it, and waits until it is gone."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._inner:  # B is the leader of a session; in its namespace everything ends with it
            for kill in (os.kill, os.killpg):
                with suppress(ProcessLookupError, PermissionError):
                    kill(self._inner, signal.SIGKILL)
        if self._outer:
            self._reap(self._outer, patience_s=GRACE_S if self._inner else 0.0)
        self._outer = self._inner = 0
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def _reap(self, outer: int, patience_s: float) -> None:
        """Waits for A, which ends when it has seen the end of B, and so of the namespace; kills it if it does not."""
        until = time.monotonic() + patience_s
        with suppress(ChildProcessError, ProcessLookupError):
            while os.waitpid(outer, os.WNOHANG)[0] == 0:
                if time.monotonic() >= until:
                    os.kill(outer, signal.SIGKILL)
                    os.waitpid(outer, 0)
                    return
                time.sleep(0.001)

    def _start(self) -> None:
        room = self._room
        if not room.closed:
            self._home = tempfile.mkdtemp(prefix="rlkd-code-")
            room = replace(room, home=self._home)
        ours, theirs = socket.socketpair()
        said, problems = os.pipe()
        steps, ready = os.pipe()
        going, go = os.pipe()
        self._channel = ours
        try:
            self._outer = enter(room, _inside(room.closed), theirs.fileno(), problems, ready, going)
        finally:
            theirs.close()
            for descriptor in (problems, ready, going):
                os.close(descriptor)
        try:
            if os.read(steps, 1) == b"u":
                if room.closed and os.geteuid() == 0:
                    map_users(self._outer)
                os.write(go, b"m")
                self._inner = int.from_bytes(os.read(steps, 4), "little")
            if problem := os.read(said, 1000):
                raise SandboxError(problem.decode(errors="replace"))
        except OSError as e:
            raise SandboxError(f"mapping users: {e}") from e
        finally:
            for descriptor in (said, steps, go):
                os.close(descriptor)
        self._send({"source": self._source, "packages": room.site})
        if self._receive(START_S) is None:
            raise SandboxError("Python did not start in the sandbox")

    def _send(self, message: dict[str, Any]) -> None:
        """To a sandbox that has ended it goes nowhere; what follows sees that."""
        if self._channel is None:
            return
        frame = json.dumps(message).encode()
        self._channel.settimeout(START_S)
        with suppress(OSError):
            self._channel.sendall(_LENGTH.pack(len(frame)) + frame)

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None, and the sandbox is gone, if none comes in time."""
        until = time.monotonic() + timeout_s
        while self._channel is not None:
            if len(self._received) >= _LENGTH.size:
                end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
                if len(self._received) >= end:
                    frame, self._received = self._received[_LENGTH.size : end], self._received[end:]
                    return self._message(frame)
            self._channel.settimeout(max(until - time.monotonic(), 0.001))
            try:
                piece = self._channel.recv(1 << 20)
            except OSError:
                piece = b""
            if not piece or len(self._received) > LARGEST:
                self.kill()
            self._received += piece
        return None

    def _message(self, frame: bytes) -> dict[str, Any] | None:
        """What process 1 or a test says; what is no message of theirs ends the sandbox."""
        try:
            message = json.loads(frame)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.kill()
            return None
        return message


def _inside(alone: bool) -> str:
    """The program that process 1 runs: the texts of two files, which import nothing of rlkd."""
    here = Path(__file__).parent
    parts = [(here / name).read_text() for name in ("sandbox_peer.py", "sandbox_inside.py")]
    return "\n".join([*parts, f"main(alone={alone})"])


def probe() -> Found:
    """What this machine gives, by trying it: a sandbox is built and asked to run a program that looks around."""
    version = sandbox_kernel.landlock_version()
    if not sandbox_filter.known(sandbox_kernel.machine()):
        return Found(Tier.PROCESS, f"no table of system calls for {sandbox_kernel.machine()}", version)
    if version == 0:
        return Found(Tier.PROCESS, "the kernel has no Landlock (Linux 5.13 with landlock in the lsm= list)", version)
    try:
        with Session(_LOOK, Room(closed=True)) as session:
            ran = session.program("", START_S)
    except SandboxError as e:
        return Found(Tier.PROCESS, f"the sandbox could not be built: {e}", version)
    if ran.stdout.strip() != "nothing":
        return Found(Tier.PROCESS, f"the sandbox leaks: {ran.stdout.strip() or ran.stderr.strip()[-200:]}", version)
    return Found(Tier.SANDBOX, "", version)


_LOOK = """
import os, socket
seen = [p for p in ("/proc/1", "/etc/passwd", "/sys", "/var", "/dev/shm") if os.path.lexists(p)]
seen += ["not process 1's child"] if os.getppid() != 1 else []
try:
    socket.socket()
    seen.append("a socket")
except PermissionError:
    pass
try:
    open("/written", "w")
    seen.append("a file outside")
except OSError:
    pass
print(" ".join(seen) or "nothing")
"""

if __name__ == "__main__":
    found = probe()
    print(json.dumps(asdict(found)))
