"""The end of a run, for people: before and after, where the time went, where things are."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkd.report import plot
from rlkd.report.history import History

ORDER = ("rollout", "verify", "guide", "score", "learn", "sync")  # of a step; others come after


def summary(directory: Path, model: Path | None = None, width: int = 72, encoding: str | None = "utf-8") -> str:
    """What the files of a run's directory say about it; `model` is where it was exported to.

    With an `encoding` that lacks the plot's characters, plainer ones are used. ValueError for a broken file.
    """
    history = History.read(directory)
    lines = [plot.terminal(history, width), *before_and_after(history), *speed(history)]
    lines += where(directory, model)
    return readable("\n".join(line for line in lines if line), encoding)


def before_and_after(history: History) -> list[str]:
    """`pass@1 on 500 held-out prompts: 0.312 [0.272, 0.354] → 0.842 [0.807, 0.871]`, for each k."""
    steps = sorted(history.evaluations)
    if not steps:
        return []
    first, last = ({e["k"]: e for e in history.evaluations[s]["estimates"]} for s in (steps[0], steps[-1]))
    lines = []
    for k, after in last.items():
        before = first.get(k)
        if before is None or len(steps) == 1:
            lines.append(f"pass@{k} on {after['prompts']} held-out prompts: {_interval(after)} after step {steps[-1]}")
            continue
        prompts = f"{before['prompts']}" if before["prompts"] == after["prompts"] else "different numbers of"
        lines.append(
            f"pass@{k} on {prompts} held-out prompts: {_interval(before)} → {_interval(after)}{_apart(before, after)}"
        )
    return lines


def _interval(estimate: Mapping[str, Any]) -> str:
    value, low, high = (math.nan if estimate[name] is None else estimate[name] for name in ("value", "low", "high"))
    return "unknown" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _apart(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["value"] is None or after["value"] is None:
        return ""
    apart = after["low"] > before["high"] or before["low"] > after["high"]
    return f"   (95 % intervals {'do not overlap' if apart else 'overlap'})"


def speed(history: History) -> list[str]:
    """Median seconds of a step and of its stages (which may overlap), and samples trained per second of training."""
    steps = [row["seconds/step"] for row in history.rows if row.get("seconds/step")]
    if not steps:
        return []
    stages: dict[str, list[float]] = {}
    for row in history.rows:
        for name, value in row.items():
            if name.startswith("seconds/") and value is not None:
                stages.setdefault(name.removeprefix("seconds/"), []).append(value)
    del stages["step"]
    parts = " · ".join(f"{stage} {statistics.median(stages[stage]):.2f}" for stage in ordered(stages))
    samples = sum(row["batch/samples"] for row in history.rows if row.get("seconds/step"))
    return [
        f"seconds per step (median of {len(steps)}): {statistics.median(steps):.2f}" + (f" — {parts}" if parts else ""),
        f"samples per second: {samples / sum(steps):.1f} ({samples:,.0f} trained in {sum(steps):,.0f} s of steps)",
    ]


def ordered(stages: Mapping[str, Any]) -> list[str]:
    """Stage names in the order in which they happen."""
    return sorted(stages, key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s))


def where(directory: Path, model: Path | None) -> list[str]:
    """Where things are; only what is there."""
    places = {
        "run": directory,
        "metrics": directory / "metrics.jsonl",
        "samples": directory / "samples",
        "events": directory / "events.jsonl",
        "picture": directory / "reward.svg",
        "model": model,
    }
    return [f"{name:<8} {path}" for name, path in places.items() if path is not None and path.exists()]


def readable(text: str, encoding: str | None) -> str:
    """The text in characters that `encoding` has: braille as *, lines and arrows in ASCII, the rest as ?."""
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join("*" if "⠀" < c <= "⣿" else c for c in text)
        text = text.translate(str.maketrans("●│┤└─·→—–█…", "o||+-.>--#."))
        return text.encode(encoding, "replace").decode(encoding)
    return text
