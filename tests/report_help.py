"""A run made up for the report's tests: groups, a report that is fed, streams that stand for terminals."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.core.types import Finish, Group, Origin, Sample
from rlkd.report.progress import Progress
from rlkd.report.report import Report
from rlkd.train.passk import Evaluation, evaluation
from tests.toys import group_of, prompt_of


def decode(tokens: np.ndarray) -> str:
    return " ".join(f"t{t}" for t in tokens)


def report(directory: Path, **changes: Any) -> Report:
    return Report(directory, decode, **{"steps": 20, **changes})


def feed(r: Report, step: int, reward: float = 0.5, **metrics: float) -> Sequence[Group]:
    """One step: two groups observed and trained."""
    groups = [group_of([reward, 1.0], [3, 5]), group_of([0.0, 0.0], [2, 2], prompt=prompt_of(2, "q"))]
    for group in groups:
        r.observe(group, {"rollout": 0.2, "verify": 0.1})
    r.step(step, groups, {"loss": 0.1, **metrics}, {"rollout": 0.25, "verify": 0.1, "learn": 0.4, "sync": 0.05})
    return groups


def evaluated(right: int, prompts: int = 500) -> Evaluation:
    outcomes = [1] * right + [0] * (prompts - right)
    return evaluation(outcomes, [1] * prompts, [1], [float(o) for o in outcomes], [4] * prompts, 3)


def guided(sample: Sample) -> Sample:
    """The same sample with its last token by a teacher."""
    origin = sample.origin.copy()
    origin[-1] = Origin.TEACHER
    return replace(sample, origin=origin)


def cut_off(sample: Sample) -> Sample:
    return replace(sample, finish=Finish.LENGTH)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(Terminal):
    """A terminal whose window is closed at some time."""

    closed_window = True

    def write(self, text: str) -> int:
        if self.closed_window:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def plain_progress(steps: int = 20) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(steps, stream), stream
