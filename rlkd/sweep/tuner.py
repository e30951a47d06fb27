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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rlkd import inputs
from rlkd.attempt import lost
from rlkd.config.load import resolved
from rlkd.config.stages import Stage, load
from rlkd.core.errors import INFRASTRUCTURE, OK, ConfigError, PreflightError
from rlkd.fleet import connect
from rlkd.lease import held
from rlkd.report import secrets
from rlkd.report.files import replace_file
from rlkd.sweep import page, record, resources, search, stopping, table
from rlkd.sweep.check import TOGETHER, checked, folder_name
from rlkd.sweep.space import Space
from rlkd.sweep.spec import combinations, overrides
from rlkd.sweep.table import Row
from rlkd.sweep.told import Told, say
from rlkd.sweep.trial import Plan, Trial
from rlkd.tune import trainable

ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a recipe begin where the command was given
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables: stdout is data
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # stopping.py
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # told.py, in a line; Tune keeps them in the trial's error.txt
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # how old Tune's record may be when the driver is killed
    "TUNE_WARN_THRESHOLD_S": "60",  # of Tune's own loop; recipes are loaded in it
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
    asked = Sweep(recipe, tuple(given), space, folder)
    drawn, first = search.algorithm(space), asked.stages(combinations(space.specs, 1)[0])
    inputs.read(first[0].config)  # folders and data that are not there are told here, once
    record.refuse_other(folder, recipe, given, space)
    with held(folder, config.preempt.lease_s, lambda text: say("lease", text), lost):
        connect(config)
        try:
            with stopping.saving(folder):
                for room in asked.rooms():
                    asyncio.run(resources.try_room(room, config.ray.wait_s))
                record.write(folder, recipe, given, space)
                found = asked.tuner(drawn).fit()
                rows = asked.rows([found[i] for i in range(len(found))])
            return asked.tell(rows)
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class Sweep:
    """What was asked for."""

    recipe: str
    given: tuple[str, ...]
    space: Space
    folder: Path

    def stages(self, values: Mapping[str, Any], *more: str) -> list[Stage]:
        """The recipe with these values."""
        return load(self.recipe, [*self.given, *overrides(values), *more])

    def rooms(self) -> list[tune.PlacementGroupFactory]:
        """What trials may ask of the cluster, each once. Ray must be there."""
        trials = [self.stages(values) for values in combinations(self.space.specs, TOGETHER)]
        return list(dict.fromkeys(resources.group(stages, self.space.settings.at_once) for stages in trials))

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def tuner(self, drawn: Any) -> tune.Tuner:
        """Tune's, new or restored. `drawn`: what draws the trials."""
        space, settings = self.space, self.space.settings
        made, parameters = self._trainable(), search.parameters(space)
        if record.restorable(self.folder):
            say("sweep", f"{self.folder}: goes on")
            return tune.Tuner.restore(str(self.folder), made, resume_errored=True, param_space=parameters)
        say("sweep", f"{self.folder}: {space.trials} trials ({search.ways(settings)})   (the same command goes on)")
        return tune.Tuner(
            made,
            param_space=parameters,
            tune_config=tune.TuneConfig(
                metric=settings.metric,
                mode=settings.mode,
                search_alg=drawn,
                scheduler=search.scheduler(space, self._every(), self._longest(), partial(_past, made.plan)),
                num_samples=(settings.trials or 1) if settings.search == "grid" else space.trials,
                trial_name_creator=record.name_of,
                trial_dirname_creator=record.name_of,
            ),
            run_config=tune.RunConfig(
                name=self.folder.name,
                storage_path=str(self.folder.parent),
                failure_config=tune.FailureConfig(max_failures=settings.failures),
                callbacks=[Told(settings.metric, space.trials)],
                verbose=0,
            ),
        )

    def _trainable(self) -> type[Trial]:
        settings = self.space.settings
        return trainable(
            self.recipe, self.given, runs=self.runs, at_once=settings.at_once, metric=settings.metric,
            pbt=settings.scheduler == "pbt", specs=self.space.specs,
        )  # fmt: skip

    def _every(self) -> int:
        """Steps between two evaluations."""
        stages = self.stages({})
        return stages[-1].config.evaluate.every or _steps(stages)

    def _longest(self) -> int:
        """Steps of the longest trial."""
        corners = combinations({k: s for k, s in self.space.specs.items() if k == "schedule.steps"}, 8)
        return max(_steps(self.stages(one)) for one in corners)

    def rows(self, results: Sequence[Any]) -> list[Row]:
        """All trials, by name; from Tune's results."""
        rows, plan = [], self._trainable().plan
        for result in results:
            values, last, name = plan.values(result.config or {}), result.metrics or {}, Path(result.path).name
            why = str(result.error).strip().splitlines()[-1] if result.error else ""
            metric = self.space.settings.metric
            rows.append(table.row(name, values, last, why, _loaded(plan, values), metric, self.runs / name))
        return sorted(rows, key=lambda r: r.name)

    def tell(self, rows: Sequence[Row]) -> int:
        """The end: the table and the best trial on stdout, the files; the exit code."""
        metric, mode = self.space.settings.metric, self.space.settings.mode
        best = table.best(rows, mode)
        lines, commands = [table.text(rows, metric, mode)], []
        if best is not None:
            name = f"{Path(self.recipe).stem}-best"
            commands = [table.command(self.recipe, self.given, best.values, name)]
            lines += ["", f"best: {best.name}, {metric} {table.shown(best.value)} after {best.step} steps", *commands]
            stages = self.stages(best.values, f"name={name}")
            if not stages[0].name:
                replace_file(self.folder / "best.yaml", resolved(stages[0].config))
                lines.append(f"the same as a recipe: {self.folder / 'best.yaml'}")
            if (model := table.newest_model(self.runs / best.name)) is not None:
                lines.append(f"its model: {model}")
        title = f"{self.folder.name}: {metric} of {len(rows)} trials"
        html = page.page(title, rows, metric, mode, best.name if best else None, commands)
        replace_file(self.folder / "report.html", html)
        lines.append(f"curves and parallel coordinates: {self.folder / 'report.html'}")
        print(secrets.without("\n".join(lines)))
        if missing := [r.name for r in rows if r.state in ("lost", "unfinished")]:
            print(f"{', '.join(missing)}: not finished; the same command goes on with them", file=sys.stderr)
            return INFRASTRUCTURE
        if best is None:
            raise PreflightError(
                "RLKD-E622", f"no trial has a {metric}; the first: {rows[0].cause or rows[0].state}",
                where=str(self.folder), fix="the table says what became of each",
            )  # fmt: skip
        return OK


def _past(plan: Plan, trial: Any) -> Mapping[int, float]:
    """What a trial that is restored had reported: the metric by step."""
    last = int(trial.last_result.get("step", -1)) if trial.last_result else -1
    if last < 0:
        return {}
    curve = table.curve(_loaded(plan, trial.config), Path(str(plan.runs)) / str(trial), plan.metric)
    return {step: value for step, value in curve.items() if step <= last}


def _loaded(plan: Plan, values: Mapping[str, Any]) -> Sequence[Stage] | None:
    """The recipe with these values; None if they do not go together, which the trial itself has said."""
    try:
        return plan.stages(values)
    except ConfigError:
        return None


def _steps(stages: Sequence[Stage]) -> int:
    return sum(stage.config.schedule.steps for stage in stages)
