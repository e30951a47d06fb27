"""Seconds that a job has between Ray's SIGTERM and its SIGKILL, and where they come from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkd.config.stages import Stage
from rlkd.core.errors import RlkdError
from rlkd.plan.saving import Grace, grace
from rlkd.plan.shape import read as shape_read
from rlkd.plan.shape import shape_of
from rlkd.submit.ending import Ending

UNKNOWN_S = 180  # where nothing is known of the model's size


def stop_s(
    stages: Sequence[Stage], said: int | None, model: Mapping[str, Any] | None, run: Path, last: Ending | None
) -> tuple[int, str]:
    """`said`: --grace; `model`: its config.json on the cluster; `run`: the run's folder; `last`: the attempt before,
    whose measured save wins over what is reckoned."""
    config = stages[0].config
    if said is not None:
        return said, "--grace"
    if config.preempt.grace_s is not None:
        return math.ceil(config.preempt.grace_s), "preempt.grace_s"
    try:
        path = config.model.path
        shape = shape_of(path) if model is None else shape_read(model, path, "model.path")
    except RlkdError:
        return UNKNOWN_S, "nothing is known of this model's size; --grace sets it"
    found: Grace = max((grace(s.config, shape, run=run) for s in stages), key=lambda g: g.total_s)
    if last is not None and last.save_s is not None:
        step_s = found.drain_s if last.step_s is None else last.step_s
        found = replace(found, save_s=last.save_s, drain_s=step_s, measured=True)
    return found.total_s, f"a save takes {found.save_s:.0f} s, " + ("measured" if found.measured else "reckoned")
