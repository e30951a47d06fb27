"""What came out of a sweep: every trial in a row, the best one as a command."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd import attempt, staged
from rlkd.config.stages import Stage
from rlkd.export import checkpoints
from rlkd.report.history import History
from rlkd.sweep.follow import before
from rlkd.sweep.spec import overrides, written
from rlkd.sweep.trial import WHOLE


@dataclass(frozen=True)
class Row:
    """One trial. `curve`: the metric by step, of what the trial's weights are made of."""

    name: str
    values: Mapping[str, Any]  # of the searched keys, as they were at the end
    state: str  # done · stopped · failed · lost · unfinished
    step: int
    value: float  # the metric, last; NaN if it has none
    curve: Mapping[int, float]
    cause: str = ""  # of failed or lost
    copied: tuple[str, ...] = ()  # PBT: `step 20 from trial-003`


def row(name: str, values: Mapping[str, Any], last: Mapping[str, Any], lost: str, stages: Sequence[Stage] | None,
        metric: str, folder: Path) -> Row:  # fmt: skip
    """`last` is the trial's last result, `lost` why Tune gave it up (or nothing). `stages`: as in `curve`."""
    step, value = int(last.get("step", 0)), float(last.get(metric, math.nan))
    cause = lost or str(last.get("failed", ""))
    ended = "done" if last.get(WHOLE) else "stopped" if last else "unfinished"
    state = "lost" if lost else "failed" if cause else ended
    return Row(name, values, state, step, value, curve(stages, folder, metric), cause, lineage(folder))


def curve(stages: Sequence[Stage] | None, root: Path, metric: str) -> dict[int, float]:
    """The metric by step, from the files of the trial's run; none without `stages`: its values fit no recipe."""
    found: dict[int, float] = {}
    if stages is None:
        return found
    folders = [root / f"{n}-{s.name}" for n, s in enumerate(stages, 1)] if stages[0].name else [root]
    for folder in folders:
        if not (folder / attempt.RECORD).exists():
            continue
        for step, evaluation in History.read(folder).evaluations.items():
            if evaluation.get(metric) is not None:
                found[before(stages, folder.name) + step] = float(evaluation[metric])
    return dict(sorted(found.items()))


def lineage(root: Path) -> tuple[str, ...]:
    """Whom the trial was copied from, and when."""
    path = root / attempt.RECORD
    if not path.exists():
        return ()
    record = json.loads(path.read_text(encoding="utf-8"))
    return tuple(f"step {one['step']} from {Path(one['from']).name}" for one in record.get("lineage", []))


def best(rows: Sequence[Row], mode: str) -> Row | None:
    """By its last value; trials that failed or were lost do not count. None if no trial has a value."""
    known = [r for r in rows if r.state not in ("failed", "lost") and math.isfinite(r.value)]
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda r: (sign * r.value, r.step), default=None)


def command(recipe: str, given: Sequence[str], values: Mapping[str, Any], name: str) -> str:
    """The command that trains with these values."""
    return shlex.join(["rlkd", "train", recipe, *given, *overrides(values), f"name={name}"])


def text(rows: Sequence[Row], metric: str, mode: str) -> str:
    """All trials, best first, in columns."""
    sign = -1 if mode == "max" else 1
    ordered = sorted(rows, key=lambda r: (not math.isfinite(r.value), sign * r.value if math.isfinite(r.value) else 0))
    keys = list(dict.fromkeys(key for r in rows for key in r.values))
    heads = ["trial", "", "steps", metric, *keys]
    cells = [
        [r.name, r.state, str(r.step), shown(r.value), *(short(r.values.get(key)) for key in keys)] for r in ordered
    ]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [heads, *cells]]
    lines = [line.rstrip() for line in lines]
    lines += [f"{r.name} {r.state}: {r.cause}" for r in ordered if r.cause]
    lines += [f"{r.name} is a copy: {', '.join(r.copied)}" for r in ordered if r.copied]
    return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else written(value)


def newest_model(root: Path) -> Path | None:
    """The folder of the trial's newest model; None if it saved none."""
    found = checkpoints(staged.run_folder(root))
    return found[max(found)] / "hf" if found else None
