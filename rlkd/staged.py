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
from rlkd.config.load import Loaded
from rlkd.config.schema import Config
from rlkd.config.stages import Stage
from rlkd.core.errors import OK, PreflightError
from rlkd.report.files import replace_file

INDEX = "stages.json"  # in the run's folder: the stages' folders, in order


def train(stages: Sequence[Stage], recipe: Path) -> int:
    """Run what is left of the stages; the exit code of the last."""
    if not stages[0].name:
        return run.train(stages[0].config, recipe)
    root = Path(stages[0].config.report.directory) / stages[0].config.name
    names = [f"{number}-{stage.name}" for number, stage in enumerate(stages, 1)]
    _open(root, names)
    code, start = OK, None
    for name, stage in zip(names, stages, strict=True):
        config = placed(stage.config, root, name, start)
        if max(exported.checkpoints(root / name), default=-1) < config.schedule.steps:
            code = run.train(config, recipe)
        else:
            run.say("stage", f"{name} is done")
        start = exported.newest(root / name)
    return code


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


def _open(root: Path, names: Sequence[str]) -> None:
    """Make the run's folder, or go on in it. PreflightError if it belongs to other stages or to something else."""
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
    elif root.exists() and any(root.iterdir()):
        raise PreflightError(
            "RLKD-E132", "the run's folder has other things in it", where=str(root), fix="give another name=…"
        )
    root.mkdir(parents=True, exist_ok=True)
    replace_file(index, json.dumps({"stages": list(names)}))
