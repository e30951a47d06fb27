"""Predicted beside measured: how far the plan was off, after a run."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkd.plan.hardware import GIB
from rlkd.plan.plan import Plan
from rlkd.plan.work import Lengths

Row = Mapping[str, Any]  # a step of metrics.jsonl: numbers, None where unknown
WARM = 2  # steps that are left out where there are more: the first compiles, fills caches, makes moments
STAGES = ("rollout", "score", "learn", "sync")


@dataclass(frozen=True)
class Compared:
    """A number, predicted and measured; NaN: the run did not measure it."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """Share of the measured by which the prediction is too large; NaN where that says nothing."""
        return self.predicted / self.measured - 1 if self.measured else math.nan


def lengths_of(rows: Sequence[Row], prompt: float) -> Lengths:
    """Of what was trained: the mean answer of the steps that are compared, and for memory the step that had the most
    to hold. ValueError if the rows say nothing of it."""
    if not _answers(rows):
        raise ValueError("no step says how many tokens it trained (batch/tokens, batch/samples)")
    answer, most = statistics.mean(_answers(_warm(rows)) or _answers(rows)), max(_answers(rows))
    text = f"prompts of {prompt:.0f} tokens, answers of {answer:.1f} (measured)"
    return Lengths(prompt, answer, math.ceil(prompt), math.ceil(most), text)


def _answers(rows: Sequence[Row]) -> list[float]:
    """Mean answer of each step that knows it, in tokens."""
    known = ((r.get("batch/tokens"), r.get("batch/samples")) for r in rows)
    return [tokens / samples for tokens, samples in known if tokens is not None and samples]


def compared(plan: Plan, rows: Sequence[Row]) -> list[Compared]:
    """Medians of the run's steps beside the plan; memory is the most that was ever held."""
    found = [Compared("step", "s", plan.step.step, _median(rows, "seconds/step"))]
    for stage in STAGES:
        predicted = getattr(plan.step, stage)
        measured = _median(rows, f"seconds/{stage}")
        if predicted or measured > 0.01:
            found.append(Compared(stage, "s", predicted, measured))
    found.append(Compared("tokens of answers", "/s", plan.tokens_per_s, _median(rows, "tokens_per_second")))
    for role in ("learner", "rollout"):
        memory = plan.memory[role]
        held = [v for r in rows if (v := r.get(f"memory/{role}_peak_gib")) is not None]
        found.append(Compared(f"memory of a {role}", "GiB", memory.total / GIB, max(held, default=math.nan)))
    return found


def _median(rows: Sequence[Row], name: str) -> float:
    known = [v for r in _warm(rows) if (v := r.get(name)) is not None]
    return statistics.median(known) if known else math.nan


def _warm(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[WARM:] if len(rows) > 2 * WARM else rows
