"""What runs inside the sandbox: process 1, which never runs the answer itself. Standard library only.

    judge ──channel──► 1 ─ fork ─► the answer as a program: standard input, output
                       └─ fork ─► the answer, to be called      (one pair per test,
                       └─ fork ─► the test, which calls it       all killed after it)

The answer's processes have no descriptor of the channel. The test reads itself from the channel, in its own process,
after the answer's was forked: neither the answer nor process 1 ever holds a test or what it expects. The outcome of a
program is not judged here at all: its output goes back, and the judge compares. A killed test's processes are gone
before the next begins: process 1 of a PID namespace ends all others with one call.

This file's text is run there behind that of sandbox_peer.py, of which it uses `send`, `receive`, `Peer`.
"""

import ast
import builtins
import os
import select
import signal
import socket
import sys
import time
import traceback
import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rlkd.engines.sandbox_peer import Peer, receive, send

CHANNEL = 3
ANSWER = "<answer>"
SHOWN = 2000  # characters of a traceback or of standard error


def main(alone: bool) -> None:
    """Serves requests until the channel ends. `alone`: this is process 1 of a PID namespace."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 gets from its own namespace only what it has a handler for
    setup = receive(CHANNEL)
    sys.path.extend(setup["packages"])
    send(CHANNEL, {"ready": os.getpid()})
    while True:
        try:
            request = receive(CHANNEL)
        except EOFError:
            return
        began = time.monotonic()
        if request["do"] == "program":
            reply = _program(setup["source"], request)
        else:
            reply = _tested(setup["source"], request["limit_s"])
        _end_all(alone)
        send(CHANNEL, {**reply, "seconds": time.monotonic() - began})


_started: list[int] = []


def _fork(run: Any, *arguments: Any) -> int:
    """A child that does nothing but `run`, in a process group of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            run(*arguments)
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc()[-SHOWN:].encode("utf-8", "backslashreplace"))
        finally:
            os._exit(code)  # whatever happens, it must not go on as a second process 1
    _started.append(pid)
    return pid


def _end_all(alone: bool) -> None:
    """Ends every process that was started here, and waits until they are gone."""
    if alone:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    else:
        for pid in _started:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    _started.clear()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _answer_only(keep: tuple[int, ...]) -> None:
    """Closes every descriptor but these and the standard three."""
    first = 3
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1 << 16)


def _run_source(source: str, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, ANSWER, "exec"), module.__dict__)
    return module.__dict__


# --- the answer as a program -----------------------------------------------------------------------------------------


def _program(source: str, request: dict[str, Any]) -> dict[str, Any]:
    given, into = os.pipe()
    out, into_out = os.pipe()
    err, into_err = os.pipe()
    pid = _fork(_as_program, source, given, into_out, into_err)
    for descriptor in (given, into_out, into_err):
        os.close(descriptor)
    watcher = os.pidfd_open(pid)
    stdin = request["stdin"].encode("utf-8", "surrogatepass")
    talk = _Talk({out: request["most"], err: 16 * SHOWN}, into, stdin, watcher, time.monotonic() + request["limit_s"])
    talk.until_end()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if talk.ended else None
    for descriptor in (out, err, watcher, *talk.writing):
        os.close(descriptor)
    shown = bytes(talk.data[err])[-SHOWN:].decode(errors="replace")
    text = bytes(talk.data[out]).decode(errors="replace")
    return {"stdout": text, "stderr": shown, "code": code, "overflow": talk.overflow}


def _as_program(source: str, given: int, out: int, err: int) -> None:
    for place, descriptor in enumerate((given, out, err)):
        os.dup2(descriptor, place)
    _answer_only(())
    try:
        _run_source(source, "__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        _flush()
        os._exit(code & 0xFF)
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            os.write(2, b"its output could not be written\n")


class _Talk:
    """Gives a process its input and reads what it writes, until it ends, writes too much, or the time is over."""

    def __init__(self, most: dict[int, int], into: int, stdin: bytes, watcher: int, until: float) -> None:
        self.most, self.stdin, self.watcher, self.until = most, stdin, watcher, until
        self.data = {descriptor: bytearray() for descriptor in most}
        self.writing = [into]  # none once all is written
        self.ended = self.overflow = False

    def until_end(self) -> None:
        reading = set(self.most)
        for descriptor in (*reading, *self.writing):
            os.set_blocking(descriptor, False)
        self._write()
        while not (self.ended or self.overflow) and (left := self.until - time.monotonic()) > 0:
            ready, writable, _ = select.select([*reading, self.watcher], self.writing, [], left)
            self.ended = self.watcher in ready  # looked at first: what it wrote before its end is read below
            reading = {descriptor for descriptor in reading if self._read(descriptor)}
            if writable:
                self._write()

    def _write(self) -> None:
        """Writes what fits; closes behind the last byte, or when nobody reads any more."""
        try:
            while self.stdin:
                self.stdin = self.stdin[os.write(self.writing[0], self.stdin[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.stdin = b""
        os.close(self.writing.pop())

    def _read(self, descriptor: int) -> bool:
        """Takes all there is now; False at the end of file."""
        while True:
            try:
                piece = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return True
            if not piece:
                return False
            self.data[descriptor] += piece
            if len(self.data[descriptor]) > self.most[descriptor]:
                del self.data[descriptor][self.most[descriptor] :]
                self.overflow = True
                return True


# --- the answer, called by a test ------------------------------------------------------------------------------------


def _tested(source: str, limit_s: float) -> dict[str, Any]:
    """Says whether the test's process came to its end; the verdict it sends itself."""
    theirs, ours = socket.socketpair()
    _fork(_as_answer, source, theirs.fileno(), ours)
    theirs.close()
    test = _fork(_as_test, ours.fileno())
    ours.close()
    watcher = os.pidfd_open(test)
    ended, _, _ = select.select([watcher], [], [], limit_s)
    os.close(watcher)
    return {"ended": bool(ended)}


def _quiet() -> None:
    nothing = os.open("/dev/null", os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nothing, place)


def _as_answer(source: str, channel: int, other: Any) -> None:
    """Runs the answer, says its names, then does what the test asks for."""
    other.close()
    _quiet()
    _answer_only((channel,))
    peer = Peer(channel, open_=True)
    try:
        names = _run_source(source, "answer")
    except BaseException as e:  # SystemExit too: an answer must not end before its test
        send(channel, {"failed": f"{type(e).__name__}: {e}"[:SHOWN]})
        return
    offered = {n: v for n, v in names.items() if not n.startswith("__")}
    modules = [n for n, v in offered.items() if isinstance(v, types.ModuleType)]
    send(channel, {"modules": modules, "names": {n: peer.packed(v) for n, v in offered.items() if n not in modules}})
    while True:
        try:
            request = receive(channel)
        except EOFError:
            return
        peer.serve(request)


def _as_test(channel: int) -> NoReturn:
    """Reads the test, runs it on the answer's names, says how it went and ends."""
    test = receive(CHANNEL)
    _quiet()
    verdict = {"passed": False, "nonce": test["nonce"]}
    try:
        verdict |= _verdict(channel, test)
    except BaseException as e:
        verdict |= {"how": "raised", "detail": f"{type(e).__name__}: {e}"[:SHOWN]}
    send(CHANNEL, verdict)
    os._exit(0)


def _verdict(channel: int, test: dict[str, Any]) -> dict[str, Any]:
    peer = Peer(channel, open_=False)
    try:
        said = receive(channel)
        if "failed" in said:
            return {"how": "answer", "detail": said["failed"]}
        names = _names(peer, said, test["before"] + "\n" + test["test"])
        exec(compile(test["before"], "<test setup>", "exec"), names)
        exec(compile(test["test"], "<test>", "exec"), names)
    except AssertionError as e:
        return {"how": "failed", "detail": f"{e}"[:SHOWN]}
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return {"how": "ended", "detail": "the answer's process ended before the test did"}
    return {"passed": True, "how": "passed", "detail": ""}


def _names(peer: Peer, said: dict[str, Any], source: str) -> dict[str, Any]:
    """What the answer defines, for the test to use. An answer's `set`, `len` or `math` must not judge: Python's own
    names stay Python's, and so does a module of Python's of which the test takes a part (`math.isclose`)."""
    owners = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)]
    parts = {owner.id for owner in owners if isinstance(owner, ast.Name)}
    names: dict[str, Any] = {"__name__": "__main__"}
    for name in {*said["modules"], *(n for n in said["names"] if n in parts)} & sys.stdlib_module_names:
        names[name] = __import__(name)
    for name, value in said["names"].items():
        if not (name in names or name.startswith("__") or hasattr(builtins, name)):  # __builtins__ is Python's too
            names[name] = peer.unpacked(value)
    return names
