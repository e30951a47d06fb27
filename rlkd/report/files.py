"""Files of a run: append-only, or replaced whole, so that they can be read while the run goes on."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.report.secrets import without

ROOM = 10_000  # rows held in memory while the disk takes none; beyond that the oldest is given up, and counted


def plain(value: Any) -> Any:
    """For json: NaN and infinities as null, numpy as Python, anything unknown as its text; no secrets (secrets.py)."""
    if isinstance(value, str):
        return without(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {without(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    return without(str(value))


def as_json(value: Any, sort_keys: bool = True) -> str:
    """One line of json that every parser takes. Unpaired surrogates (broken text of a model) become question marks."""
    text = json.dumps(plain(value), sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")


class Lines:
    """A jsonl file: one row a line, given to the system at once.

    `cut` is a last line that a killed writer left unfinished: it is taken out when the file is opened again. A write
    that fails (disk full) leaves no half line: the rows are held and written with the next one; `problem` says why,
    `held` how many wait, `lost` how many were given up. Opening raises OSError.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.problem: str | None = None
        self.lost = 0
        self._held: list[bytes] = []
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.cut = self._without_cut_line(self._file)

    @property
    def held(self) -> int:
        return len(self._held)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. ValueError after `close`."""
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        self._held.append(as_json(row).encode() + b"\n")
        self._flush(self._file)

    def _flush(self, file: int) -> None:
        data, size = b"".join(self._held), os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError as e:
            os.ftruncate(file, size)
            self.problem = f"{self.path}: {e.strerror}"
            self.lost += max(0, len(self._held) - ROOM)
            self._held = self._held[-ROOM:]
        else:
            self._held, self.problem = [], None

    def close(self) -> None:
        """Try the held rows once more; what then is still held is lost."""
        if self._file is not None:
            self._flush(self._file)
            os.close(self._file)
            self._file = None

    @staticmethod
    def _without_cut_line(file: int) -> str | None:
        end = os.fstat(file).st_size
        start, tail = end, b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - (1 << 16))
            tail = os.pread(file, end - start, start)
        cut = tail[tail.rfind(b"\n") + 1 :]
        if not cut:
            return None
        os.ftruncate(file, end - len(cut))
        return cut.decode("utf-8", "replace")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, without a last line that is still being written; empty if there is no file.

    ValueError naming file and line for a line that is no json.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{path}:{number}: not a row of json: {e}") from e
    return rows


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never half of it, and no secret (secrets.py).
    OSError leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(without(text), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
