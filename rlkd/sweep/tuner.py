"""A sweep from its beginning, or from where it was killed, to its table.

FOLDER/sweep.json    what was asked for: the same command goes on, another one is refused
FOLDER/runs/…        the trials' runs, each a run of rlkd like any other
FOLDER/report.html   curves and parallel coordinates        FOLDER/best.yaml   the best trial as a recipe
the rest             Ray Tune's own record
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rlkd import inputs
from rlkd.attempt import lost
from rlkd.config.load import resolved
from rlkd.config.stages import load
from rlkd.core.errors import INFRASTRUCTURE, OK, PreflightError
from rlkd.fleet import connect
from rlkd.lease import held
from rlkd.report.files import replace_file
from rlkd.sweep import page, record, resources, stopping, table
from rlkd.sweep.check import checked, folder_name
from rlkd.sweep.space import Space
from rlkd.sweep.spec import combinations, overrides
from rlkd.sweep.table import Row
from rlkd.sweep.told import Told, say
from rlkd.workers.placement import reserve

ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a recipe begin where the command was given
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # stopping.py
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # how old Tune's record may be when the driver is killed
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def sweep(
    recipe: str,
    given: Sequence[str],
    space_file: Path,
    name: str | None = None,
    trials: int | None = None,
    at_once: int | None = None,
) -> int:
    """Run it; the exit code. RlkdError if something is wrong before the first trial starts, Stopped when asked to."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    space = checked(recipe, given, str(space_file), trials, at_once)
    config = load(recipe, given)[0].config
    folder = Path(config.report.directory).resolve() / folder_name(str(space_file), name)
    first = load(recipe, [*given, *overrides(combinations(space.specs, 1)[0])])
    inputs.read(first[0].config)  # folders and data that are not there are told here, once
    record.refuse_other(folder, recipe, given, space)
    with held(folder, config.preempt.lease_s, lambda text: say("lease", text), lost):
        record.write(folder, recipe, given, space)
        connect(config)
        try:
            with stopping.saving(folder):
                room = resources.group(first, space.settings.at_once)
                asyncio.run(_room(resources.as_bundles(room), config.ray.wait_s))
                rows = _tuned(recipe, given, space, folder)
            return _told(rows, recipe, given, space, folder)
        finally:
            ray.shutdown()


async def _room(wanted: list[Any], wait_s: float) -> None:
    """PreflightError that says what is missing if the cluster has no room for one trial."""
    (await reserve(wanted, wait_s)).release()


def _tuned(recipe: str, given: Sequence[str], space: Space, folder: Path) -> list[Row]:
    """Everything that is left of the sweep; all its trials."""
    from ray import tune

    from rlkd.sweep import search
    from rlkd.tune import trainable

    settings, runs = space.settings, folder / "runs"
    made = trainable(
        recipe, given, runs=runs, at_once=settings.at_once, metric=settings.metric, pbt=settings.scheduler == "pbt",
        specs=space.specs,
    )  # fmt: skip
    parameters, drawn = search.parameters(space), search.algorithm(space)
    stages = load(recipe, given)
    every = stages[-1].config.evaluate.every or sum(s.config.schedule.steps for s in stages)
    if record.restorable(folder):
        say("sweep", f"{folder}: goes on")
        tuner = tune.Tuner.restore(str(folder), made, resume_errored=True, param_space=parameters)
    else:
        say("sweep", f"{folder}: {space.trials} trials ({search.ways(settings)})   (the same command goes on)")
        tuner = tune.Tuner(
            made,
            param_space=parameters,
            tune_config=tune.TuneConfig(
                metric=settings.metric,
                mode=settings.mode,
                search_alg=drawn,
                scheduler=search.scheduler(space, every, _longest(recipe, given, space), partial(_past, made.plan)),
                num_samples=(settings.trials or 1) if settings.search == "grid" else space.trials,
                trial_name_creator=record.name_of,
                trial_dirname_creator=record.name_of,
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                failure_config=tune.FailureConfig(max_failures=settings.failures),
                callbacks=[Told(settings.metric, space.trials)],
                verbose=0,
            ),
        )
    found = tuner.fit()
    rows = []
    for result in found:
        values = made.plan.values(result.config or {})
        last = result.metrics or {}
        lost = str(result.error).strip().splitlines()[-1] if result.error else ""
        name = Path(result.path).name
        trial = made.plan.stages(result.config or {})
        rows.append(table.row(name, values, last, lost, trial, settings.metric, runs / name, bool(last)))
    return sorted(rows, key=lambda r: r.name)


def _longest(recipe: str, given: Sequence[str], space: Space) -> int:
    """Steps of the longest trial."""
    corners = combinations({k: s for k, s in space.specs.items() if k == "schedule.steps"}, 8)
    every = [load(recipe, [*given, *overrides(one)]) for one in corners]
    return max(sum(stage.config.schedule.steps for stage in stages) for stages in every)


def _past(plan: Any, trial: Any) -> Mapping[int, float]:
    """What a trial that is restored had reported: the metric by step."""
    last = int(trial.last_result.get("step", -1)) if trial.last_result else -1
    if last < 0:
        return {}
    curve = table.curve(plan.stages(trial.config), Path(plan.runs) / str(trial), plan.metric)
    return {step: value for step, value in curve.items() if step <= last}


def _told(rows: Sequence[Row], recipe: str, given: Sequence[str], space: Space, folder: Path) -> int:
    """The end: the table and the best trial on stdout, the files; the exit code."""
    metric, mode = space.settings.metric, space.settings.mode
    lines, commands, best = [table.text(rows, metric, mode)], [], table.best(rows, mode)
    if best is not None:
        again = f"{Path(recipe).stem}-best"
        commands = [table.command(recipe, given, best.values, again)]
        lines += ["", f"best: {best.name}, {metric} {table.shown(best.value)} after {best.step} steps", *commands]
        stages = load(recipe, [*given, *overrides(best.values), f"name={again}"])
        if not stages[0].name:
            replace_file(folder / "best.yaml", resolved(stages[0].config))
            lines.append(f"the same as a recipe: {folder / 'best.yaml'}")
        if (model := table.newest_model(folder / "runs" / best.name)) is not None:
            lines.append(f"its model: {model}")
    title = f"{folder.name}: {metric} of {len(rows)} trials"
    html = page.page(title, rows, metric, mode, best.name if best else None, commands)
    replace_file(folder / "report.html", html)
    lines.append(f"curves and parallel coordinates: {folder / 'report.html'}")
    print("\n".join(lines))
    missing = [r.name for r in rows if r.state in ("lost", "unfinished")]
    if missing:
        print(f"{', '.join(missing)}: not finished; the same command goes on with them", file=sys.stderr)
        return INFRASTRUCTURE
    if best is None:
        raise PreflightError(
            "RLKD-E603", f"no trial has a {metric}; the first: {rows[0].cause or rows[0].state}", where=str(folder),
            fix="see above what each of them says",
        )  # fmt: skip
    return OK
