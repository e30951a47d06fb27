"""Small checkpoints for the store's tests, and child processes that die while they write one."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkd.store.store import Store

FILES = {"driver.json": b'{"step": 1}', "learner/rank-0.pt": bytes(range(256)) * 40, "hf/model.safetensors": b"w" * 999}
CHILD = """
import sys
from pathlib import Path
from tests.store_help import saved
from rlkd.store.store import Store
store = Store(Path(sys.argv[1]))
for step in map(int, sys.argv[2:]):
    saved(store, step)
"""


class Told:
    """Remembers what a store tells."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, kind: str, text: str, **fields: Any) -> None:
        self.events.append((kind, text, fields))

    @property
    def text(self) -> str:
        return "\n".join(text for _, text, _ in self.events)


def content(step: int) -> dict[str, bytes]:
    """What the files of a step's checkpoint hold: something else at each step."""
    return {name: str(step).encode() + data for name, data in FILES.items()}


def fill(draft: Path, step: int) -> Path:
    for name, data in content(step).items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(data)
    return draft


def saved(store: Store, step: int, **facts: Any) -> Path:
    return store.commit(fill(store.draft(step), step), step, {"of": step, **facts})


def is_of(path: Path, step: int) -> bool:
    """Whether every file of a checkpoint holds what `saved` wrote."""
    return all((path / name).read_bytes() == data for name, data in content(step).items())


def child(directory: Path, *steps: int, faults: str = "", script: str = CHILD) -> int:
    """Save these steps in a process of its own; its exit code (9: died at a fault point)."""
    environment: Mapping[str, str] = {**os.environ, "RLKD_FAULT": faults}
    command = [sys.executable, "-c", script, str(directory), *map(str, steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode not in (0, 9, -9):
        raise AssertionError(done.stderr)
    return done.returncode


def flip(path: Path, at: int = -1) -> None:
    """Change one byte; the middle one if not said."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at < 0 else at] ^= 1
    path.write_bytes(data)
