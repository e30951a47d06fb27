"""Runs a recipe's stages one after the other. Each is a run of its own in the run's folder, `1-sft`, `2-rl`, …

A stage starts from the Hugging Face folder of the last checkpoint before it: its weights, with a fresh optimizer. (The
folder has the model's dtype: in bfloat16 the float32 copy of the weights does not pass on.) The same command skips what
is done and goes on in the stage that was interrupted.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkd import export as exported
from rlkd import run
from rlkd.attempt import RECORD, lost, run_directory
from rlkd.config.load import Loaded
from rlkd.config.schema import Config
from rlkd.config.stages import Stage
from rlkd.core.errors import OK, ConfigError, PreflightError
from rlkd.lease import held
from rlkd.report.files import replace_file
from rlkd.watch import Watch

INDEX = "stages.json"  # in the run's folder: the stages' folders, in order


def train(
    stages: Sequence[Stage],
    recipe: Path,
    resume: str = "auto",
    accept_new_data: bool = False,
    watch: Watch | None = None,
) -> int:
    """Run what is left of the stages; the exit code of the last. The other arguments as in run.train."""
    if not stages[0].name:
        return run.train(stages[0].config, recipe, resume, accept_new_data, watch=watch)
    root = run_directory(stages[0].config)
    names = [f"{number}-{stage.name}" for number, stage in enumerate(stages, 1)]
    _may_resume(root, resume)
    _check(root, names)
    with held(root, stages[0].config.preempt.lease_s, lambda text: run.say("lease", text), lost):
        _open(root, names)
        return _all(stages, names, root, recipe, accept_new_data, watch)


def _all(
    stages: Sequence[Stage],
    names: Sequence[str],
    root: Path,
    recipe: Path,
    accept_new_data: bool,
    watch: Watch | None,
) -> int:
    code, start = OK, None
    for name, stage in zip(names, stages, strict=True):
        config = placed(stage.config, root, name, start)
        if max(exported.checkpoints(root / name), default=-1) < config.schedule.steps:
            code = run.train(config, recipe, "auto", accept_new_data, name != names[-1], watch)
        else:
            run.say("stage", f"{name} is done")
        start = exported.newest(root / name)
    return code


def _may_resume(root: Path, resume: str) -> None:
    if resume.isdecimal():
        raise ConfigError(
            "RLKD-C414",
            f"--resume {resume}, but the recipe has stages, and each counts its own steps",
            where="command line",
            fix="--resume auto; to go back in a stage, move its later checkpoints away",
        )
    if resume == "never" and (root / INDEX).exists():
        raise PreflightError(
            "RLKD-E162",
            "--resume never, but there is a run in this folder",
            where=str(root),
            fix="give another name=…, or --resume auto to go on with it",
        )


def check(stages: Sequence[Stage]) -> dict[str, Any]:
    """Every stage checked. A later stage's model is not there yet: it is checked with the first one's."""
    if not stages[0].name:
        return run.check(stages[0].config)
    results = {stage.name: run.check(stage.config) for stage in stages}
    text = "\n\n".join(f"stage {name}\n{result['text']}" for name, result in results.items())
    return {"stages": {n: {k: v for k, v in r.items() if k != "text"} for n, r in results.items()}, "text": text}


def placed(config: Config, root: Path, name: str, start: Path | None) -> Config:
    """The stage's config, in its folder and from where the stage before it ended."""
    config = replace(config, name=name, report=replace(config.report, directory=str(root)))
    if config.checkpoint.remote is not None:  # another run's stages have the same names
        remote = f"{config.checkpoint.remote.rstrip('/')}/{root.name}"
        config = replace(config, checkpoint=replace(config.checkpoint, remote=remote))
    if start is None:
        return config
    config = replace(config, model=replace(config.model, path=str(start)))
    if not isinstance(config, Loaded):
        return config
    rest = {key: text for key, text in config.written.expressions.items() if key != "model.path"}
    return replace(config, written=replace(config.written, expressions=rest))


def run_folder(directory: Path) -> Path:
    """The folder of a run, or, of a run with stages, that of the last stage with a checkpoint."""
    index = directory / INDEX
    if not index.exists():
        return directory
    folders = [directory / name for name in json.loads(index.read_text())["stages"]]
    begun = [folder for folder in folders if exported.checkpoints(folder)]
    return begun[-1] if begun else folders[0]


def begun_folder(directory: Path) -> Path:
    """The folder of a run, or, of a run with stages, that of the last stage that was begun."""
    index = directory / INDEX
    if not index.exists():
        return directory
    folders = [directory / name for name in json.loads(index.read_text())["stages"]]
    return next((folder for folder in reversed(folders) if (folder / RECORD).exists()), folders[0])


def _open(root: Path, names: Sequence[str]) -> None:
    """Make the run's folder, or go on in it. PreflightError if it belongs to other stages or to something else."""
    _check(root, names)
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / INDEX, json.dumps({"stages": list(names)}))


def _check(root: Path, names: Sequence[str]) -> None:
    """PreflightError if the folder belongs to other stages or to something else."""
    index = root / INDEX
    if index.exists():
        there = json.loads(index.read_text())["stages"]
        if there != list(names):
            raise PreflightError(
                "RLKD-E135",
                f"this run has the stages {', '.join(there)}, and the recipe {', '.join(names)}",
                where=str(root),
                fix="give another name=…",
            )
    elif root.exists() and any(not p.name.startswith(".lease") for p in root.iterdir()):
        raise PreflightError(
            "RLKD-E132", "the run's folder has other things in it", where=str(root), fix="give another name=…"
        )
