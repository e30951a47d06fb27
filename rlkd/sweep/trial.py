"""One trial: rlkd's own run, in a thread of Ray Tune's actor, in a folder of its own.

Tune is told every held-out evaluation, and with each a checkpoint that is a small file: which run, which step. The
weights stay where rlkd committed them. A trial whose process was killed goes on by rlkd's own ledger; one that is told
another trial's file (PBT) becomes a copy of that run; one that Tune stops saves and ends as by Ctrl-C.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs
from ray.exceptions import RayActorError
from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.result import SHOULD_CHECKPOINT

from rlkd.attempt import lost
from rlkd.config.stages import Stage, load
from rlkd.core.errors import (
    DATA,
    DIVERGED,
    PREFLIGHT,
    USAGE,
    ConfigError,
    InfrastructureError,
    NodesGone,
    RlkdError,
    Stopped,
)
from rlkd.core.stop import StopRequest
from rlkd.export import checkpoints
from rlkd.fork import Origin, forked, since
from rlkd.lease import held
from rlkd.report import secrets
from rlkd.report.files import as_json, plain, replace_file
from rlkd.sweep import resources
from rlkd.sweep.follow import Following, Heard, recorded, wait_for_the_other
from rlkd.sweep.spec import Spec, overrides

REFERENCE = "rlkd.json"
WHOLE = "whole"  # in a result: the run did its last step (Tune sets `done` when its scheduler stops a trial, too)
STOP = ".stop"  # in the sweep's folder: every trial saves and ends
END_S = 540.0  # for a save at the end; Tune kills after 600 s
FOR_GOOD = (USAGE, PREFLIGHT, DATA, DIVERGED)  # the same trial would end so again
OF_MACHINES = {  # whatever the exit code: on another node, or later, the same trial may work
    "RLKD-C412",  # preempt.must_end_by is over: a later one goes on
    "RLKD-E020", "RLKD-E021", "RLKD-E603",  # no room; no GPU in the cluster, or none that the process sees
    "RLKD-E022", "RLKD-E024", "RLKD-E025", "RLKD-E026", "RLKD-E310",  # what a node lacks
    "RLKD-E160",  # another process still has the folder
    "RLKD-E170", "RLKD-E602",  # a full disk, full shared memory
    "RLKD-E191", "RLKD-E711",  # a cluster, a teacher's endpoint that does not answer
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What all trials have in common."""

    recipe: str
    given: tuple[str, ...]  # overrides for all of them
    cwd: str  # where paths of the recipe begin
    runs: str | None = None  # where the trials' runs go; None: `runs` in Tune's folder of the experiment
    specs: Mapping[str, Spec] = field(default_factory=dict)
    at_once: int | None = None
    metric: str = "eval/pass@1"  # by which trials are compared
    copies: bool = False  # PBT: a checkpoint with every evaluation

    def stages(self, config: Mapping[str, Any], own: Sequence[str] = ()) -> list[Stage]:
        """The recipe of the trial with this config of Tune's. ConfigError as usual."""
        return load(self.recipe, [*self.given, *overrides(self.values(config)), *own])

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """By dotted key, each within what its distribution can give. Sections within sections are joined."""
        flat = dict(_flat(config))
        return {key: self.specs[key].nearest(value) if key in self.specs else value for key, value in flat.items()}


class Trial(Trainable):
    """`rlkd.tune.trainable` makes a subclass with its plan."""

    plan: ClassVar[Plan]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        try:
            stages = cls.plan.stages(config)
        except ConfigError:  # Tune would end; the trial itself says so (`_failed`)
            stages = cls.plan.stages({})
        return resources.group(stages, cls.plan.at_once)

    def setup(self, config: dict[str, Any]) -> None:
        os.chdir(self.plan.cwd)
        if self.plan.cwd not in sys.path:
            sys.path.insert(0, self.plan.cwd)  # for algorithms and rewards of one's own
        secrets.learn(os.environ, self.plan.recipe, self.plan.given)
        self.given = dict(config)
        self.root = self._root()
        self.run: Following | None = None
        self.origin: Origin | None = None
        self.told: dict[str, Any] = {"step": 0, self.plan.metric: math.nan}  # the last result

    def step(self) -> dict[str, Any]:
        """The next evaluation's metrics; `done` with the last."""
        if self.run is None:
            try:
                old = self._begin()
            except RlkdError as error:
                return self._failed(error)
            if old is not None:
                return self._result(old)
        assert self.run is not None
        while True:
            going = self.run.running  # asked before: what the run says last is heard all the same
            if (heard := self.run.next()) is not None:
                return self._heard(self.run, heard)
            if not going:
                return self._ended(self.run)
            self._look_for_stop(self.run)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        written = {"run": str(self.root), "told": self.told}
        (Path(checkpoint_dir) / REFERENCE).write_text(json.dumps(written), encoding="utf-8")

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """`checkpoint_dir` is a path: `save_checkpoint` returns no dict."""
        read = json.loads((Path(checkpoint_dir) / REFERENCE).read_text(encoding="utf-8"))
        self.told = read["told"]
        self.origin = Origin(Path(read["run"]), int(self.told["step"]))

    def cleanup(self) -> None:
        """Tune is done with this trial: the run saves and ends, if it has not."""
        if self.run is None:
            return
        over = self.told["step"] >= _steps(self.run.stages)  # it only writes its last checkpoint
        request = None if over else StopRequest("user", "the sweep stops this trial")
        if not self.run.end(request, END_S):
            print(f"{self.root}: the run did not end within {END_S:g} s; its last checkpoint stands", file=sys.stderr)

    # --- inside

    def _root(self) -> Path:
        """The run's folder."""
        name, runs = self.trial_name, self.plan.runs
        if runs is None:
            assert self._storage is not None  # Tune gave one
            local = isinstance(self._storage.storage_filesystem, pyarrow.fs.LocalFileSystem)
            above = self._storage.experiment_fs_path if local else f"runs/{self._storage.experiment_dir_name}"
            runs = f"{above}/runs"
        return Path(runs).resolve() / name

    def _begin(self) -> Heard | None:
        """Start the run, or go on with it; an evaluation that Tune was not told of before the process was killed."""
        stages, values = self._stages(), plain(self.plan.values(self.given))
        lease_s = stages[0].config.preempt.lease_s
        wait_for_the_other(self.root, lease_s, END_S + lease_s)
        if self.origin is None:
            _move_other(self.root, values)
        replace_file(_note(self.root), as_json(values) + "\n")
        resume, old = "auto", None
        if self.origin is not None and self.origin.run != self.root:
            with held(self.root, lease_s, lambda text: print(f"{self.root}: {text}", file=sys.stderr), lost):
                step = forked(self.origin, self.root, values)
                resume = self._resume(step)
            self.told = {**self.told, "step": step}  # the same weights, the same metrics
        elif (found := recorded(stages, self.root)) is not None and (
            self.origin is None or found.step > self.origin.step
        ):
            old = found
        self.run = Following(stages, Path(self.plan.recipe), self.root, resume)
        return old

    def _stages(self) -> list[Stage]:
        """The recipe of this trial's run."""
        own = [f"name={self.root.name}", f"report.directory={self.root.parent}"]
        config, more = (stages := self.plan.stages(self.given, own))[-1].config, []
        if config.checkpoint.remote is not None:  # trials of two sweeps have the same names
            more += [f"checkpoint.remote={config.checkpoint.remote.rstrip('/')}/{self.root.parent.parent.name}"]
        if self.plan.copies:
            more += [f"checkpoint.every={config.evaluate.every}", f"checkpoint.keep={max(4, config.checkpoint.keep)}"]
        return self.plan.stages(self.given, [*own, *more]) if more else stages

    def _resume(self, step: int) -> str:
        """After a copy: from it, and from none that the remote store has; when it has gone on since, from there. What
        the process before it committed late is set aside."""
        own = since(self.root)
        newest = max(own, default=step)
        return "auto" if own and newest == max(checkpoints(self.root)) else str(newest)

    def _heard(self, run: Following, heard: Heard) -> dict[str, Any]:
        if self.plan.copies and heard.step > 0:
            run.saved(heard.step, END_S)
        if heard.step >= _steps(run.stages):
            run.end(None, END_S)
            if not run.running:
                self._result(heard)
                return self._ended(run)
        return self._result(heard)

    def _result(self, heard: Heard) -> dict[str, Any]:
        known = {self.plan.metric: math.nan, **heard.metrics}  # Tune ends if its metric is missing
        self.told = {"step": heard.step, **known, SHOULD_CHECKPOINT: True}
        return dict(self.told)

    def _ended(self, run: Following) -> dict[str, Any]:
        """What the end of the run means for Tune."""
        if run.error is None:
            return {**self.told, "done": True, WHOLE: True}
        if run.stop.is_set() and self._sweep_stops():  # this process is ended by its driver
            time.sleep(END_S)
        if _machine_goes(run) and run.gained():  # else it counts: what comes to nothing must not be tried for ever
            raise RayActorError(error_msg=f"its machine goes away: {_cause(run.error)}", preempted=True) from run.error
        if isinstance(run.error, RlkdError):
            return self._failed(run.error)
        raise run.error

    def _failed(self, error: RlkdError) -> dict[str, Any]:
        """A trial whose settings do not work has a result too; what the machines did is tried again by Tune, so many
        times (`sweep.failures`); then the trial is lost, and the sweep's command goes on with it."""
        if error.exit_code not in FOR_GOOD or any(p.code in OF_MACHINES for p in error.problems):
            raise error
        return {**self.told, "done": True, "failed": _cause(error), SHOULD_CHECKPOINT: False}

    def _look_for_stop(self, run: Following) -> None:
        if not run.stop.is_set() and self._sweep_stops():
            run.stop.ask(StopRequest("user", "the sweep was asked to stop"))

    def _sweep_stops(self) -> bool:
        return (self.root.parent.parent / STOP).exists()


def _machine_goes(run: Following) -> bool:
    """Whether the run ended because a node that it needs is taken away, or its time there is up. Ray Tune does not
    count a trial's actor that was preempted as a failure, and this is one that saved before."""
    asked = run.stop.is_set() and isinstance(run.error, InfrastructureError)  # it was gone before the save was done
    return asked or isinstance(run.error, Stopped | NodesGone)


def _cause(error: BaseException) -> str:
    """In a line."""
    if isinstance(error, RlkdError):
        return secrets.without("; ".join(f"{p.code}: {p.what}" for p in error.problems))
    return secrets.without(error.message if isinstance(error, Stopped) else f"{type(error).__name__}: {error}")


def _note(root: Path) -> Path:
    """Beside a run: the values that its trial was given last."""
    return root.with_name(f".{root.name}.json")


def _move_other(root: Path, values: Mapping[str, Any]) -> None:
    """Tune knows nothing of this trial. A run that is here is from before Tune's record was lost: one of the same
    values goes on, any other is moved away, for its checkpoints are of other settings."""
    if not root.exists():
        return
    try:
        same = json.loads(_note(root).read_text(encoding="utf-8")) == values
    except (OSError, ValueError):
        same = False
    if not same:
        number = len(list(root.parent.glob(f".old-{root.name}-*"))) + 1
        os.rename(root, root.with_name(f".old-{root.name}-{number}"))


def _steps(stages: Sequence[Stage]) -> int:
    return sum(stage.config.schedule.steps for stage in stages)


def _flat(config: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        path = f"{above}.{key}" if above else str(key)
        found += _flat(value, path) if isinstance(value, Mapping) else [(path, value)]
    return found
