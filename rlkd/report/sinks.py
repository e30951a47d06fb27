"""Where metrics also go. metrics.jsonl is the source of truth; a sink that is slow, down or refuses never holds up or
ends a run: it works in its own thread behind a bounded queue, and what it could not take is counted."""

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

QUEUE = 1000  # rows waiting for one sink; beyond that the oldest is dropped


class Sink(Protocol):
    """Somewhere that takes a row of metrics a step. Opened, fed and closed in a thread of its own."""

    def open(self) -> None: ...
    def write(self, step: int, row: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Isolated:
    """A sink behind a queue. Its first error is told once and ends it; rows it did not take are counted."""

    def __init__(self, name: str, sink: Sink, tell: Callable[[str], None], room: int = QUEUE) -> None:
        self.name, self.dropped = name, 0
        self._sink, self._tell = sink, tell
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(room)
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Never blocks, never raises."""
        if self._failed:
            self.dropped += 1
            return
        while True:
            try:
                self._rows.put_nowait((step, row))
                return
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._rows.get_nowait()
            self.dropped += 1
        except queue.Empty:  # the sink took it in the meantime
            return

    def close(self, wait_s: float = 10.0) -> None:
        """Give the sink `wait_s` seconds to finish, then leave it."""
        left = self._rows.qsize()
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            self._drop_oldest()
            self._rows.put_nowait(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._tell(f"{self.name} did not finish within {wait_s:g} s: up to {left} rows are not there")
        elif self.dropped:
            self._tell(f"{self.name} did not take {self.dropped} rows; they are in metrics.jsonl")

    def _run(self) -> None:
        try:
            self._sink.open()
            while (item := self._rows.get()) is not None:
                self._sink.write(*item)
            self._sink.close()
        except Exception as e:  # whatever a tracker raises, the run goes on
            self._failed = True
            while not self._rows.empty():
                self._drop_oldest()
            self._tell(f"{self.name} is off for the rest of this run: {type(e).__name__}: {e}")


class TensorBoard:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; `offline` needs no account and can be synced later with `wandb sync`."""

    def __init__(self, directory: Path, project: str, name: str, mode: str, config: Mapping[str, Any]) -> None:
        self.settings: dict[str, Any] = {
            "dir": str(directory),
            "project": project,
            "name": name,
            "mode": mode,
            "config": dict(config),
        }

    def open(self) -> None:
        import wandb

        self.run = wandb.init(**self.settings, resume="allow", id=self.settings["name"], settings=wandb.Settings(
            silent=True, init_timeout=60))  # fmt: skip

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()
