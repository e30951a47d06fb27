"""Inside the jail: the keeper, which holds the loaded rewards and forks, and the children, which score. Light: no Ray,
no torch.

    worker ──control──► keeper (one, single-threaded; imports the rewards once)
       │                  └─ fork ─► child (one group at a time; may be killed at any moment)
       └──────── request, reply, output ───┘

The keeper ends with the worker (end of file on the control socket, or the kernel's parent-death signal), the children
with the keeper. Whatever a reward forks is in its child's process group, or is handed to the keeper as their subreaper:
it ends with the child. There is no RLIMIT_NPROC: it counts a user's threads over all containers of a machine, so it
would break rewards that have done nothing wrong; a fork bomb ends with its group's time.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NoReturn

import psutil

from rlkd.core.errors import PreflightError, RlkdError
from rlkd.engines.judge import judge

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
FILE_BYTES = 1 << 30  # the largest file a reward may write
TEXT = 16_384  # characters of a traceback
LENGTH = struct.Struct(">I")


def main(setup: Mapping[str, Any]) -> None:
    """The keeper's life. `setup`: control (a file descriptor), parent (a pid), load (`module:function`), rewards
    (bytes), memory (bytes a child may use beyond what the keeper has), min_tier and accept_unsafe_code (for rewards
    that run code, see sandbox_rules.py)."""
    control = socket.socket(fileno=setup["control"])
    _end_with(setup["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        module, _, function = setup["load"].partition(":")
        rewards = getattr(importlib.import_module(module), function)(setup["rewards"])
        standing = _equipped(rewards, setup)
    except PreflightError as e:
        problem = {name: value[-TEXT:] if value else None for name, value in asdict(e.problems[0]).items()}
        control.send(json.dumps({"refused": problem}).encode())
        return
    except RlkdError as e:
        control.send(json.dumps({"failed": str(e)[-TEXT:]}).encode())
        return
    except BaseException:
        control.send(json.dumps({"failed": traceback.format_exc()[-TEXT:]}).encode())
        return
    gc.freeze()  # what is loaded stays shared between the children
    control.send(json.dumps({"ready": list(rewards), "standing": standing}).encode())
    keeper = _Keeper(control, rewards, setup["memory"])
    try:
        try:
            keeper.serve()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # end of file and the signal come together; end_all must run
    finally:
        keeper.end_all()


def _equipped(rewards: Mapping[str, Any], setup: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Where rewards that run code run it; None, and nothing is imported or tried, if there are none."""
    if not any(getattr(reward, "runs_code", False) for reward in rewards.values()):
        return None
    from rlkd.engines.sandbox_rules import equip

    standing = equip(rewards, setup["min_tier"], setup["accept_unsafe_code"])
    return None if standing is None else asdict(standing)


def _end_with(parent: int) -> None:
    """Ends this process when `parent` ends. The signal also comes when only the thread that started us ends."""

    def parent_gone(*_: object) -> None:
        if os.getppid() != parent:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(0)

    signal.signal(signal.SIGTERM, parent_gone)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)


class _Keeper:
    """Answers the worker's two requests: fork a child onto these file descriptors; end a child and say how it ended."""

    def __init__(self, control: socket.socket, rewards: Mapping[str, Any], memory: int) -> None:
        self.control, self.rewards, self.memory = control, rewards, memory
        self.children: set[int] = set()

    def serve(self) -> None:
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.control, 4096, 2)
            if not message:
                return
            request = json.loads(message)
            done = self.fork(*descriptors) if request["do"] == "fork" else self.end(request["pid"])
            self.control.send(json.dumps({"done": done}).encode())

    def fork(self, channel: int, output: int) -> int:
        keeper = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self.control.close()
            _child(channel, output, keeper, self.rewards, self.memory)
        with suppress(OSError):  # the child does it too; whoever comes first
            os.setpgid(pid, pid)
        os.close(channel)
        os.close(output)
        self.children.add(pid)
        return pid

    def end(self, pid: int) -> int | None:
        """Kills a child and all it has started. Returns its exit code, or minus the signal that ended it."""
        if pid not in self.children:
            return None
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self.children.discard(pid)
        self._end_strays()
        return os.waitstatus_to_exitcode(status)

    def _end_strays(self, patience_s: float = 2.0) -> None:
        """Kills what dead children left behind in sessions of its own; as their subreaper we are its parent now."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            strays = [p for p in psutil.Process().children() if p.pid not in self.children]
            if not strays:
                return
            for stray in strays:
                with suppress(psutil.Error):
                    for process in [*stray.children(recursive=True), stray]:
                        process.kill()
                with suppress(ChildProcessError):
                    os.waitpid(stray.pid, os.WNOHANG)
            time.sleep(0.005)

    def end_all(self) -> None:
        for pid in list(self.children):
            self.end(pid)


def _child(channel: int, output: int, keeper: int, rewards: Mapping[str, Any], memory: int) -> NoReturn:
    """A child's life: takes limits upon itself, then scores group after group. Leaves only by os._exit."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(0)
        with suppress(OSError):
            os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        with suppress(AttributeError, ValueError):  # a reward's module may have put something else there
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable(file=2)
        _limit(memory)
        _serve(socket.socket(fileno=channel), rewards)
    except BaseException:
        os.write(2, traceback.format_exc()[-TEXT:].encode())
        os._exit(1)
    os._exit(0)


def _limit(memory: int) -> None:
    """Address space: what is mapped now plus `memory` bytes. No core files, no file above FILE_BYTES."""
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, mapped + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _serve(channel: socket.socket, rewards: Mapping[str, Any]) -> None:
    me = os.getpid()

    def tell(message: Mapping[str, object]) -> None:
        if os.getpid() != me:  # a reward forked and both sides came back
            os._exit(0)
        frame = json.dumps(message).encode()
        channel.sendall(LENGTH.pack(len(frame)) + frame)

    stream = channel.makefile("rb")
    while head := stream.read(LENGTH.size):
        prompt, answers, limit_s = pickle.loads(stream.read(LENGTH.unpack(head)[0]))
        reply = judge(rewards, prompt, answers, limit_s, lambda name: tell({"running": name}))
        for printed in (sys.stdout, sys.stderr):
            with suppress(Exception):  # a reward may have closed or replaced them
                printed.flush()
        tell(reply)
