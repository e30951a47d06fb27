"""One place in the jail: a child that scores one group at a time, replaced when anything goes wrong."""

import json
import math
import os
import pickle
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rlkd.core.types import Answer, Prompt
from rlkd.core.verdict import Failure, Outcome
from rlkd.engines.jailed import LENGTH
from rlkd.engines.keeper import Child, Keeper

OUTPUT = 65_536  # bytes of what a child prints that are kept, the last ones
LARGEST_REPLY = 1 << 20  # bytes that are read of a reply; a child that says more is out of its mind

Scores = dict[str, list[float | None]]


class Cell:
    """Not thread-safe: one call at a time."""

    def __init__(self, keeper: Keeper, grace_s: float) -> None:
        self._keeper, self._grace_s = keeper, grace_s
        self._child: Child | None = None

    def open(self) -> None:
        """Forks the child unless there is one."""
        if self._child is None:
            self._child = self._keeper.fork()

    def call(self, prompt: Prompt, answers: Sequence[Answer], limit_s: float) -> Scores | Failure:
        """The scores of the answers by reward name, or why there are none. The child is interrupted from inside after
        `limit_s`, killed from outside `grace_s` later; after any failure the next call gets a fresh one."""
        self.open()
        assert self._child is not None
        talk = _Talk(self._child, time.monotonic() + limit_s + self._grace_s)
        reply = talk.ask(pickle.dumps((prompt, tuple(answers), limit_s)))
        if reply is not None and "scores" in reply:
            scores: Scores = reply["scores"]
            return scores
        child, self._child = self._child, None
        if reply is not None:
            talk.drain()
            self._keeper.end(child)
            return Failure(Outcome(reply["outcome"]), reply["reward"], reply["detail"], talk.printed)
        late = talk.late
        if not late:
            talk.drain()
        status = self._keeper.end(child)
        if late:
            detail = f"did not end within {limit_s:g} s, nor {self._grace_s:g} s after being interrupted: killed"
            return Failure(Outcome.TIMEOUT, talk.running, detail, talk.printed)
        return Failure(Outcome.CRASHED, talk.running, _cause(status), talk.printed)

    def close(self) -> None:
        if self._child is not None:
            self._keeper.end(self._child)
            self._child = None


def _cause(status: int | None) -> str:
    if status is None:
        return "its process was lost"
    if status >= 0:
        return f"its process ended with exit code {status} before it gave any score"
    name = signal.Signals(-status).name
    hint = " (killed for memory by the system?)" if name == "SIGKILL" else ""
    return f"its process was ended by signal {name}{hint}"


class _Talk:
    """One request to a child, until it replies, ends, or the deadline passes."""

    def __init__(self, child: Child, deadline: float) -> None:
        self.child, self.deadline = child, deadline
        self.running: str | None = None  # the reward that was last said to run
        self.late = False
        self._received = b""
        self._output = b""

    @property
    def printed(self) -> str:
        return self._output.decode(errors="replace")

    def ask(self, request: bytes) -> dict[str, Any] | None:
        """The reply, or None: the child has ended, or `late`."""
        channel = self.child.channel
        channel.settimeout(None if math.isinf(self.deadline) else max(self.deadline - time.monotonic(), 0.01))
        try:
            channel.sendall(LENGTH.pack(len(request)) + request)
        except TimeoutError:
            self.late = True
            return None
        except OSError:
            return None
        channel.setblocking(False)
        poll = select.poll()
        for descriptor in (channel.fileno(), self.child.output, self.child.alive):
            poll.register(descriptor, select.POLLIN)
        while (left := self.deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(None if math.isinf(left) else math.ceil(left * 1000)))
            if self.child.output in ready and not self._read_output():
                poll.unregister(self.child.output)
            ended = self.child.alive in ready
            if channel.fileno() in ready or ended:
                open_ = self._read_channel()
                reply = self._reply()
                if reply is not None:
                    return reply
                if ended or not open_:
                    return None
        self.late = True
        return None

    def drain(self) -> None:
        """Takes what the child has printed and we have not read, without waiting."""
        for _ in range(OUTPUT // 4096):
            if not self._read_output():
                return

    def _read_output(self) -> bool:
        """Reads some output and keeps the end of it all; False at the end of file or when there is nothing now."""
        try:
            piece = os.read(self.child.output, OUTPUT)
        except BlockingIOError:
            return False
        self._output = (self._output + piece)[-OUTPUT:]
        return bool(piece)

    def _read_channel(self) -> bool:
        """Reads all there is now; False at the end of file."""
        with suppress(BlockingIOError):
            while len(self._received) <= LARGEST_REPLY:
                try:
                    piece = self.child.channel.recv(65_536)
                except ConnectionResetError:  # it ended before it had read all of the request
                    return False
                if not piece:
                    return False
                self._received += piece
            return False
        return True

    def _reply(self) -> dict[str, Any] | None:
        """The reply if it has come in whole; takes note of the rewards said to run on the way. A reward that writes
        into the channel ends up here too: what is no message of ours ends the talk."""
        while len(self._received) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._received)[0]
            if end > LARGEST_REPLY:
                return self._gibberish()
            if len(self._received) < end:
                return None
            try:
                message: dict[str, Any] = json.loads(self._received[LENGTH.size : end])
                self._received = self._received[end:]
                if "running" not in message:
                    return message if "scores" in message or "outcome" in message else self._gibberish()
                self.running = str(message["running"])
            except (ValueError, TypeError):
                return self._gibberish()
        return None

    def _gibberish(self) -> dict[str, Any]:
        detail = "it wrote something into the verifier's channel that is no reply"
        return {"outcome": Outcome.CRASHED.value, "reward": self.running, "detail": detail}
