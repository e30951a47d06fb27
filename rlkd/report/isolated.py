"""What takes metrics elsewhere, kept apart from the run: metrics.jsonl is the source of truth.

A sink that is slow, down or refuses never holds up or ends a run. It works in its own thread behind a bounded queue;
what it could not take is counted and told.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

Say = Callable[[str], None]


@runtime_checkable
class Sink(Protocol):
    """Somewhere that takes a row of metrics a step. `open`, `write`, `close` are called in a thread of its own and may
    raise or hang; `kill` is called by the run when `close` has not returned in time, and must return at once."""

    def open(self, say: Say) -> None: ...
    def write(self, step: int, row: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...
    def kill(self) -> None: ...


class Isolated:
    """A sink in its own thread.

    `write` puts a row into a queue of `room` rows and drops the oldest when that is full. An error in `open` ends the
    sink; an error in `write` loses that row, and is told once until a row goes through again. `tell` is only called
    from `write` and `close`, so in the caller's thread.
    """

    def __init__(self, name: str, sink: Sink, tell: Say, room: int = 1000) -> None:
        self.name, self.room = name, room
        self.dropped = 0  # rows the sink did not take
        self._sink, self._tell = sink, tell
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque()
        self._notes: deque[str] = deque()
        self._change = threading.Condition()
        self._closing = self._dead = self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Never waits for the sink, never raises."""
        with self._change:
            self._rows.append((step, row))
            while self._rows and (self._dead or len(self._rows) > self.room):
                self._rows.popleft()
                self.dropped += 1
            self._change.notify()
        self._pass_notes()

    def close(self, wait_s: float = 30.0) -> None:
        """Give the sink `wait_s` seconds to finish, then end it. Tells what it did not take. Once."""
        with self._change:
            if self._closing:
                return
            self._closing = True
            self._change.notify()
        self._thread.join(wait_s)
        if late := self._thread.is_alive():
            with self._change:
                self.dropped += len(self._rows)
                self._rows.clear()
            self._sink.kill()
        self._pass_notes()
        if late:
            self._tell(f"{self.name} did not finish within {wait_s:g} s and was left; metrics.jsonl has every row")
        if self.dropped:
            self._tell(f"{self.name} did not take {self.dropped} rows; metrics.jsonl has every row")

    def _pass_notes(self) -> None:
        while self._notes:
            self._tell(self._notes.popleft())

    def _run(self) -> None:
        try:
            self._sink.open(lambda text: self._notes.append(f"{self.name}: {text}"))
        except Exception as e:  # whatever a tracker raises, the run goes on
            self._notes.append(f"{self.name} is off for this run: {_short(e)}")
            with self._change:
                self._dead = True
                self.dropped += len(self._rows)
                self._rows.clear()
            return
        while (item := self._next()) is not None:
            self._feed(*item)
        try:
            self._sink.close()
        except Exception as e:
            self._notes.append(f"{self.name} did not close: {_short(e)}")

    def _next(self) -> tuple[int, Mapping[str, float]] | None:
        with self._change:
            self._change.wait_for(lambda: self._rows or self._closing)
            return self._rows.popleft() if self._rows else None

    def _feed(self, step: int, row: Mapping[str, float]) -> None:
        try:
            self._sink.write(step, row)
            self._failing = False
        except Exception as e:
            with self._change:
                self.dropped += 1
            if not self._failing:
                self._notes.append(f"{self.name} did not take step {step}: {_short(e)}")
            self._failing = True


def _short(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0] if lines else ''}"
