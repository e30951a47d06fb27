"""What a run writes for people and programs. Append-only or replaced atomically, so it can be read while running."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.core.types import Group, Origin, Sample


def plain(value: Any) -> Any:
    """For json: NaN and infinities as null, numpy as Python, anything unknown as its text."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | np.ndarray):
        return [plain(v) for v in value]
    return str(value)


class Lines:
    """A jsonl file: one row a line, flushed at once. A last line cut short by a kill is dropped when it is reopened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._drop_cut_line()

    def _drop_cut_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - (1 << 20)))
        tail = self._file.read()
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(plain(row), sort_keys=True, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, without a last line that is still being written; empty if there is no file."""
    if not path.exists():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in whole if line.strip()]


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_samples(path: Path, groups: Sequence[Group], decode: Callable[[np.ndarray], str]) -> None:
    """A few groups of a step, readable: the question, every answer with its reward's parts and its advantage."""
    rows = [
        {
            "prompt": group.prompt.id,
            "question": group.prompt.text or decode(group.prompt.tokens),
            "answer": group.prompt.answer,
            "seed": group.prompt.seed,
            "samples": [_readable(sample, decode) for sample in group.samples],
        }
        for group in groups
    ]
    replace_file(path, "".join(json.dumps(plain(r), ensure_ascii=False) + "\n" for r in rows))


def _readable(sample: Sample, decode: Callable[[np.ndarray], str]) -> dict[str, Any]:
    written = sample.origin != Origin.PROMPT
    advantage = None if sample.advantage is None else sample.advantage[written]
    flat = advantage is not None and len(advantage) > 0 and bool((advantage == advantage[0]).all())
    return {
        "text": decode(sample.tokens[written]),
        "tokens": sample.tokens[written],
        "reward": sample.reward,
        "scores": sample.scores,
        "advantage": advantage[0] if flat and advantage is not None else advantage,
        "finish": sample.finish.value,
        "versions": sample.versions,
        "guided": sample.guided,
    }
