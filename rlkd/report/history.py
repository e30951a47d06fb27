"""A run as its files tell it: while it goes on, after it ended, over all its attempts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.report.files import read_lines


@dataclass(frozen=True)
class History:
    """One row a step and one evaluation a step, ascending, each of the latest attempt that did it."""

    rows: Sequence[Mapping[str, Any]]
    evaluations: Mapping[int, Mapping[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> "History":
        """Read metrics.jsonl and eval/. What an earlier attempt did after the step where a later one took over is left
        out: training it again made it void. ValueError for a broken file."""
        rows = latest(read_lines(directory / "metrics.jsonl"))
        last = rows[-1]["step"] if rows else math.inf
        found = (json.loads(p.read_text(encoding="utf-8")) for p in sorted((directory / "eval").glob("step-*.json")))
        return cls(rows, {e["step"]: e for e in found if e["step"] <= last})

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, NaN where it is unknown."""
        values = [row.get(name) for row in self.rows]
        return [int(row["step"]) for row in self.rows], [math.nan if v is None else float(v) for v in values]

    def pass_at(self, k: int) -> dict[int, tuple[float, float, float]]:
        """Held-out pass@k by step: value, and the ends of its 95 % interval. Unknown values are left out."""
        found = {}
        for step, evaluation in sorted(self.evaluations.items()):
            for e in evaluation["estimates"]:
                if e["k"] == k and e["value"] is not None:
                    found[step] = (e["value"], e["low"], e["high"])
        return found


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step once. A row makes all rows before it in the file void that have its step or a later one."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept
