"""What a sweep was asked to do, in its folder, so that only the same command goes on with it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlkd.config.load import resolved
from rlkd.config.stages import load
from rlkd.core.errors import PreflightError
from rlkd.report.files import replace_file
from rlkd.sweep.space import Space
from rlkd.sweep.trial import STOP

FILE = "sweep.json"


def asked(recipe: str, given: Sequence[str], space: Space) -> dict[str, Any]:
    """All that decides what the trials are."""
    settings = {f"sweep.{k}": v for k, v in asdict(space.settings).items()}
    specs = {key: str(spec) for key, spec in space.specs.items()}
    recipes = {f"recipe {s.name}".strip(): resolved(s.config) for s in load(recipe, given)}
    return {**settings, **specs, **recipes}


def refuse_other(folder: Path, recipe: str, given: Sequence[str], space: Space) -> None:
    """PreflightError RLKD-E620 if the folder is another sweep's, or something else's."""
    if not folder.exists():
        return
    try:
        was = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if all(p.name.startswith((".lease", STOP)) for p in folder.iterdir()):  # stopped before its first trial
            return
        raise PreflightError(
            "RLKD-E620", f"the sweep's folder has other things in it and no {FILE}", str(folder), "give another --name"
        ) from None
    now = asked(recipe, given, space)
    other = [_change(key, was.get(key), now.get(key)) for key in [*now, *(k for k in was if k not in now)]
             if was.get(key) != now.get(key)]  # fmt: skip
    if other:
        raise PreflightError(
            "RLKD-E620",
            f"the sweep in this folder was asked for something else: {'; '.join(other)}",
            where=str(folder),
            fix="take back what was changed, or give another --name",
        )


def write(folder: Path, recipe: str, given: Sequence[str], space: Space) -> None:
    """Before a trial starts; and no trial is asked to stop any more."""
    replace_file(folder / FILE, json.dumps(asked(recipe, given, space), indent=1))
    (folder / STOP).unlink(missing_ok=True)


def restorable(folder: Path) -> bool:
    """Whether Ray Tune's record is there and knows of trials. A file of it that a kill left half-written is moved away:
    Tune would use the newest."""
    known = False
    for state in sorted(folder.glob("experiment_state-*.json")):
        try:
            known |= bool(json.loads(state.read_text(encoding="utf-8"))["trial_data"])
        except (ValueError, KeyError):
            os.rename(state, state.with_name(f".bad-{state.name}"))
    return known and (folder / "tuner.pkl").exists()


def name_of(trial: Any) -> str:
    """`trial-003`, the same after a restore; of a searcher that counts nothing, its own id."""
    number = str(trial.trial_id).rpartition("_")[2]
    return f"trial-{int(number):03d}" if number.isdecimal() and "_" in trial.trial_id else f"trial-{trial.trial_id}"


def _change(key: str, was: Any, now: Any) -> str:
    if not key.startswith("recipe"):
        return f"{key} {was} → {now}"
    lines = set(str(was).splitlines()), set(str(now).splitlines())
    new = "; ".join(sorted(line.strip() for line in lines[1] - lines[0])) or "something left out"
    return f"the {key} ({new[:200]})"
