"""Where metrics also go: TensorBoard's event files, and Weights & Biases through a process of its own."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlkd.report.files import as_json, replace_file
from rlkd.report.isolated import Isolated, Say

__all__ = ["Isolated", "TensorBoard", "Wandb"]


class TensorBoard:
    """Event files for `tensorboard --logdir`. A resumed run hides the steps it does again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writer: Any = None

    def open(self, say: Say) -> None:
        import torch.utils.tensorboard  # noqa: F401  fails now if it is not installed, and not at the first row

    def write(self, step: int, row: Mapping[str, float]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.directory), purge_step=step)
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def kill(self) -> None:
        """Nothing to end: its thread ends with the program."""


class Wandb:
    """`offline` needs no account and can be sent later with `wandb sync`; `online` without a login falls back to it.

    `config` is shown to everybody who sees the run: give the redacted one. Files are under `directory`/wandb; all
    attempts of a run have one wandb id.
    """

    def __init__(
        self,
        directory: Path,
        project: str,
        name: str,
        mode: str,
        config: Mapping[str, Any],
        start_s: float = 90.0,
        finish_s: float = 15.0,
    ) -> None:
        self.directory, self.start_s, self.finish_s = directory, start_s, finish_s
        self.settings = {"dir": str(directory), "project": project, "name": name, "mode": mode, "config": config}
        self.process: subprocess.Popen[bytes] | None = None
        self._heard = b""

    @property
    def _log(self) -> Path:
        return self.directory / "wandb" / "process.log"

    def open(self, say: Say) -> None:
        """Start the process and wait until wandb is ready. RuntimeError if it says no, TimeoutError after start_s."""
        self._say = say
        folder = self.directory / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"id": _run_id(folder / "run-id"), "init_s": self.start_s / 3, "finish_s": self.finish_s}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run; and it can be killed with what it starts
            )
        try:
            self._send({**settings, **self.settings})
            self._wait(time.monotonic() + self.start_s, "ready")
        except Exception:
            self.kill()
            raise

    def write(self, step: int, row: Mapping[str, float]) -> None:
        if self._listen(0.0) == "end":
            raise RuntimeError(f"its process has ended; see {self._log}")
        self._send({**row, "step": step})

    def close(self) -> None:
        """Let wandb finish; TimeoutError if that takes much longer than finish_s. Nothing of it is left."""
        if self.process is None or self.process.stdin is None:
            return
        try:
            self.process.stdin.close()
            self._wait(time.monotonic() + self.finish_s + 5.0, "end")
            code = self.process.wait(5.0)
        finally:
            self.kill()
        if code:
            raise RuntimeError(f"its process ended with code {code}; see {self._log}")

    def kill(self) -> None:
        """End the process and what it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(as_json(message).encode() + b"\n")
        self.process.stdin.flush()

    def _wait(self, until: float, event: str) -> None:
        """Listen until the process is ready, or has ended."""
        while (left := until - time.monotonic()) > 0:
            heard = self._listen(left)
            if heard == event:
                return
            if heard == "end":
                raise RuntimeError(f"its process has ended; see {self._log}")
        raise TimeoutError(f"waiting for its “{event}” took too long; see {self._log}")

    def _listen(self, wait_s: float) -> str | None:
        """Take in what the process has to say; "ready", "end", or None. RuntimeError when it could not start."""
        assert self.process is not None
        assert self.process.stdout is not None
        pipe, event = self.process.stdout.fileno(), None
        if not select.select([pipe], [], [], wait_s)[0]:
            return None
        if not (heard := os.read(pipe, 1 << 16)):
            return "end"
        *lines, self._heard = (self._heard + heard).split(b"\n")
        for line in lines:
            for kind, text in json.loads(line).items():
                if kind == "note":
                    self._say(text)
                elif kind == "failed":
                    raise RuntimeError(text)
                else:
                    event = kind
        return event


def _run_id(path: Path) -> str:
    """The run's id with wandb: made once, the same for every attempt."""
    if not path.exists():
        replace_file(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
