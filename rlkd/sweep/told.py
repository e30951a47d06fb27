"""What a sweep says while it goes on: a line for each start, evaluation and end of a trial, on stderr."""

import math
import sys
from pathlib import Path
from typing import Any

from ray.tune import Callback

from rlkd.report import secrets
from rlkd.sweep.spec import overrides
from rlkd.sweep.trial import WHOLE


def say(who: str, text: str) -> None:
    print(secrets.without(f"[{who}] {text}"), file=sys.stderr, flush=True)


class Told(Callback):
    """Ray Tune calls it."""

    def __init__(self, metric: str, trials: int) -> None:
        self.metric, self.trials = metric, trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        step = (trial.last_result or {}).get("step")
        again = "starts" if step is None else f"goes on (it told of step {step})"
        say(str(trial), f"{again}: {' '.join(overrides(trial.config))}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("failed"):
            say(str(trial), f"failed: {result['failed']}")
            return
        value = result.get(self.metric, math.nan)
        say(str(trial), f"step {result['step']}: {self.metric} {value:.4g}{'; done' if result.get(WHOLE) else ''}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = sum(t is trial or t.is_finished() for t in trials)
        last = trial.last_result or {}
        if WHOLE not in last and "failed" not in last:
            say(str(trial), "stopped by the scheduler")
        say("sweep", f"{ended} of {self.trials} trials have ended")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(str(trial), f"was lost ({why_lost(trial.error_file)}); it goes on from its checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(str(trial), f"was lost too often: {why_lost(trial.error_file)}")


def why_lost(path: str | None) -> str:
    """From Tune's error.txt, which has every failure of the trial: what the last one was, in a line."""
    try:
        text = Path(str(path)).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no error was given"
    _, *lines = [line.strip() for line in text.rpartition("Failure # ")[2].splitlines() if line.strip()] or [""]
    if not lines:
        return "no error was given"
    return lines[-1 if lines[0].startswith(("ray::", "Traceback")) else 0]  # an exception; a process that is gone
