"""A sweep's parts without Ray: forks, following a run, what a trial tells Tune, tables, pages, the folder."""

import asyncio
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.exceptions import RayActorError
from ray.tune import PlacementGroupFactory
from ray.tune.result import SHOULD_CHECKPOINT

from rlkd import job, staged
from rlkd.config.stages import Stage, load
from rlkd.core.errors import (
    RESUBMIT,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    InfrastructureError,
    NodesGone,
    PreflightError,
    Problem,
    Stopped,
)
from rlkd.core.stop import StopRequest
from rlkd.fork import Origin, forked
from rlkd.report.files import replace_file
from rlkd.store.store import Store
from rlkd.sweep import follow, record, resources, search, stopping, table
from rlkd.sweep.follow import Following, before, recorded, steps_saved
from rlkd.sweep.page import page
from rlkd.sweep.spec import Spec
from rlkd.sweep.table import Row
from rlkd.sweep.told import Told, why_lost
from rlkd.sweep.trial import STOP, Plan, Trial
from rlkd.sweep.tuner import Sweep
from rlkd.tune import trainable
from rlkd.watch import Watch
from rlkd.workers.placement import Bundle, seated
from tests.store_help import is_of, saved
from tests.sweep_help import EVERY, read, recipe, space_file

METRIC = "eval/pass@1"


# --- forks


def run_with(folder: Path, *steps: int) -> Path:
    """The folder of a run that saved these steps."""
    store = Store(folder / "checkpoints")
    for step in steps:
        saved(store, step, fingerprint={"seed": 0})
    replace_file(folder / "run.json", json.dumps({"name": folder.name, "attempts": [{"attempt": 1}]}))
    return folder


def test_a_fork_has_the_other_s_checkpoint_and_none_of_its_own_later_ones(tmp_path: Path) -> None:
    donor, own = run_with(tmp_path / "donor", 10, 20), run_with(tmp_path / "own", 20, 30)
    (own / "checkpoints/step-000020/driver.json").write_bytes(b"mine")
    assert forked(Origin(donor, 20), own, {"learner.lr": 2e-4}) == 20
    store = Store(own / "checkpoints")
    assert store.there() == [20]
    assert store.verify(20) == []
    assert is_of(store.path(20), 20)
    facts = store.at(20).manifest.facts
    assert facts["run"] == "own"
    assert facts["fingerprint"] == {"seed": 0}
    assert facts["lineage"]["from"] == str(donor)
    assert json.loads((own / "run.json").read_text())["lineage"][0]["step"] == 20
    assert Store(donor / "checkpoints").verify(20) == []


def test_a_fork_of_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    donor = run_with(tmp_path / "donor", 10, 20)
    assert forked(Origin(donor, 20), tmp_path / "new", {}) == 20
    assert Store(tmp_path / "new/checkpoints").there() == [20]


def test_the_same_fork_again_changes_nothing(tmp_path: Path) -> None:
    """A trial that was killed after the copy, and had gone on since."""
    donor, own = run_with(tmp_path / "donor", 10, 20), tmp_path / "own"
    forked(Origin(donor, 20), own, {"learner.lr": 2e-4})
    saved(Store(own / "checkpoints"), 25)
    assert forked(Origin(donor, 20), own, {"learner.lr": 2e-4}) == 20
    assert Store(own / "checkpoints").there() == [20, 25]
    forked(Origin(donor, 20), own, {"learner.lr": 3e-4})  # another copy, from the same place
    assert Store(own / "checkpoints").there() == [20]


def test_what_was_deleted_meanwhile_is_followed_by_the_next(tmp_path: Path) -> None:
    donor = run_with(tmp_path / "donor", 30, 40)
    assert forked(Origin(donor, 20), tmp_path / "own", {}) == 30
    with pytest.raises(CheckpointError, match="no checkpoint of step 50 or later"):
        forked(Origin(donor, 50), tmp_path / "other", {})


def test_a_damaged_checkpoint_is_not_copied(tmp_path: Path) -> None:
    donor, own = run_with(tmp_path / "donor", 10, 20), run_with(tmp_path / "own", 10, 20)
    (donor / "checkpoints/step-000020/driver.json").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="damaged"):
        forked(Origin(donor, 20), own, {})
    assert Store(own / "checkpoints").there() == [10, 20]


# --- following a run


class FakeRun:
    """In the place of staged.train: tells these evaluations, then waits, ends, or fails."""

    def __init__(
        self,
        told: Sequence[int] = (),
        error: BaseException | None = None,
        waits: bool = False,
        saves: int | None = None,
        asked: StopRequest | None = None,
    ) -> None:
        """`saves`: a checkpoint of this step; `asked`: somebody asks it to stop, when it has told everything."""
        self.told, self.error, self.waits, self.saves, self.asked = told, error, waits, saves, asked
        self.calls: list[tuple[str, list[Stage]]] = []

    def __call__(self, stages: list[Stage], recipe: Path, resume: str, watch: Watch) -> int:
        self.calls.append((resume, stages))
        for step in self.told:
            watch.evaluated(stages[0].config, step, {METRIC: step / 100})
        if self.saves is not None:
            run_with(Path(stages[0].config.report.directory) / stages[0].config.name, self.saves)
        if self.asked is not None:
            watch.stop.ask(self.asked)
        while self.waits and not watch.stop.is_set():
            time.sleep(0.01)
        if self.error is not None:
            raise self.error
        if watch.stop.is_set():
            raise Stopped(RESUBMIT, "saved")
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRun]:
    def made(*args: Any, **options: Any) -> FakeRun:
        run = FakeRun(*args, **options)
        monkeypatch.setattr(staged, "train", run)
        return run

    return made


def test_evaluations_are_heard_in_order(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([0, 5, 10])
    following = Following(load(recipe(tmp_path), EVERY), Path("r.yaml"), tmp_path)
    heard = [following.next(5.0) for _ in range(3)]
    assert [h.step for h in heard if h is not None] == [0, 5, 10]
    assert following.end(None, 5.0)
    assert following.error is None
    assert following.next(0.01) is None


def test_a_run_that_is_asked_to_stop_ends(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([0], waits=True)
    following = Following(load(recipe(tmp_path), EVERY), Path("r.yaml"), tmp_path)
    assert not following.end(None, 0.05)
    assert following.end(StopRequest("user", "the sweep stops it"), 5.0)
    assert isinstance(following.error, Stopped)


def test_steps_count_on_through_the_stages(tmp_path: Path) -> None:
    stages = load(recipe(tmp_path, stages=[{"name": "a"}, {"name": "b"}]), EVERY)
    assert [before(stages, name) for name in ("1-a", "2-b")] == [0, 20]
    assert before(load(recipe(tmp_path), EVERY), "whatever") == 0
    with pytest.raises(ValueError, match="is no stage"):
        before(stages, "3-c")


def evaluated(run: Path, step: int, value: float) -> None:
    estimate = {"k": 1, "value": value, "low": 0.0, "high": 1.0}
    told = {"step": step, "estimates": [estimate], METRIC: value, "time": "now"}
    replace_file(run / "eval" / f"step-{step:06d}.json", json.dumps(told))


def test_what_a_killed_trial_had_not_told_is_found(tmp_path: Path) -> None:
    """Only what its checkpoint has behind it: the rest will be evaluated again."""
    run, stages = run_with(tmp_path / "runs/trial-000", 5, 10), load(recipe(tmp_path), EVERY)
    assert recorded(stages, tmp_path / "none") is None
    assert recorded(stages, run) is None
    for step in (5, 10, 15):
        evaluated(run, step, step / 100)
    found = recorded(stages, run)
    assert found is not None
    assert (found.step, dict(found.metrics)) == (10, {METRIC: 0.1})


# --- what a trial tells Tune


def trial(tmp_path: Path, config: dict[str, Any] | None = None, **plan: Any) -> Trial:
    """One outside of Tune."""
    made = object.__new__(Trial)
    name = recipe(tmp_path)
    Trial.plan = Plan(name, tuple(EVERY), str(tmp_path), str(tmp_path / "sweep/runs"), **plan)
    made.given, made.root = config or {"learner.lr": 1e-4}, tmp_path / "sweep/runs/trial-000"
    made.run, made.origin, made.told = None, None, {"step": 0, METRIC: math.nan}
    return made


def test_a_trial_tells_every_evaluation_and_is_done_with_the_last(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    run, one = fake([0, 5, 20]), trial(tmp_path)
    told = [one.step() for _ in range(3)]
    assert [r["step"] for r in told] == [0, 5, 20]
    assert [r.get("done", False) for r in told] == [False, False, True]
    assert all(r[SHOULD_CHECKPOINT] for r in told)
    ((resume, stages),) = run.calls
    config = stages[0].config
    assert resume == "auto"
    assert (config.name, config.learner.lr) == ("trial-000", 1e-4)
    assert Path(config.report.directory) == tmp_path / "sweep/runs"


def test_a_run_without_a_last_evaluation_is_done_all_the_same(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([5])
    one = trial(tmp_path)
    assert one.step()["step"] == 5
    assert one.step() == {"step": 5, METRIC: 0.05, SHOULD_CHECKPOINT: True, "done": True, "whole": True}


def test_a_run_that_was_never_evaluated_has_an_unknown_metric(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    """Tune itself ends on a result without the metric."""
    fake([])
    result = trial(tmp_path).step()
    assert result["done"]
    assert math.isnan(result[METRIC])


def test_an_evaluation_without_the_metric_has_an_unknown_one(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([5])
    assert math.isnan(trial(tmp_path, metric="eval/other").step()["eval/other"])


@pytest.mark.parametrize(
    "error",
    [
        DivergedError("RLKD-T001", "no number"),
        DataError("RLKD-D020", "no signal"),
        PreflightError("RLKD-E142", "cannot be trained here"),
        ConfigError("RLKD-C010", "no such value"),
    ],
)
def test_a_trial_whose_settings_do_not_work_has_a_result(
    tmp_path: Path, fake: Callable[..., FakeRun], error: Exception
) -> None:
    fake([], error=error)
    result = trial(tmp_path).step()
    assert result["done"]
    assert math.isnan(result[METRIC])  # unknown, never 0
    assert error.args[0] in result["failed"]


def test_a_recipe_that_cannot_be_loaded_is_a_result_too(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([])
    assert "RLKD-C012" in trial(tmp_path, {"learner.lr": -1.0}).step()["failed"]


def test_values_that_fit_no_recipe_do_not_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corners are checked before the start, and not everything between them: Tune still gets a group for the trial,
    and the table its row."""
    asked: list[float] = []

    def group(stages: list[Stage], _: int | None) -> PlacementGroupFactory:
        asked.append(stages[0].config.learner.lr)
        return PlacementGroupFactory([{"CPU": 1}])

    monkeypatch.setattr(resources, "group", group)
    made = trainable(recipe(tmp_path), EVERY, runs=tmp_path / "runs")
    made.default_resource_request({"learner.lr": 3e-4})
    made.default_resource_request({"learner.lr": -1.0})
    assert asked == [3e-4, load(recipe(tmp_path))[0].config.learner.lr]
    bad = {"step": 0, METRIC: math.nan, "failed": "RLKD-C012: learner.lr=-1.0"}
    one = SimpleNamespace(config={"learner.lr": -1.0}, metrics=bad, path=str(tmp_path / "trial-000"), error=None)
    space = read(tmp_path, "learner.lr: {uniform: [-1, 1]}\n")
    (found,) = Sweep(recipe(tmp_path), tuple(EVERY), space, tmp_path).rows([one])
    assert (found.state, found.curve, found.cause) == ("failed", {}, "RLKD-C012: learner.lr=-1.0")


@pytest.mark.parametrize(
    "error",
    [
        InfrastructureError("RLKD-I003", "the run lost a worker"),
        PreflightError("RLKD-E160", "another process works in this folder"),
        PreflightError("RLKD-E020", "the cluster cannot place this run"),
        PreflightError("RLKD-E026", "node abc cannot run rlkd"),
        PreflightError("RLKD-E170", "3 saves in a row failed: no space left on device"),
        PreflightError.of([Problem("RLKD-E024", "not shared"), Problem("RLKD-E025", "other packages")]),
        ConfigError("RLKD-C412", "preempt.must_end_by is over"),
        Stopped(RESUBMIT, "the node goes away"),
        RuntimeError("a bug"),
    ],
)
def test_what_the_machines_did_is_raised_so_that_tune_tries_again(
    tmp_path: Path, fake: Callable[..., FakeRun], error: Exception
) -> None:
    fake([5], error=error)
    one = trial(tmp_path)
    assert one.step()["step"] == 5
    with pytest.raises(type(error)):
        one.step()


DRAIN = StopRequest("drain", "node abc is taken away in 30 s")


@pytest.mark.parametrize(
    "end",
    [
        {"asked": DRAIN},
        {"asked": StopRequest("deadline", "preempt.must_end_by")},
        {
            "asked": DRAIN,
            "error": InfrastructureError("RLKD-I003", "the run lost a worker"),
        },  # before the save was done
        {"error": NodesGone("RLKD-I613", "too few workers")},
    ],
)
def test_a_trial_whose_machine_goes_is_not_charged(
    tmp_path: Path, fake: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch, end: dict[str, Any]
) -> None:
    """It saved, ends at once, and Tune takes it for preempted; only the whole sweep's stop is waited for."""
    monkeypatch.setattr("rlkd.sweep.trial.time.sleep", lambda _: pytest.fail("it idles"))
    fake([5], saves=7, **end)
    one = trial(tmp_path)
    one.step()
    with pytest.raises(RayActorError, match=r"its machine goes away: [^\n]+$") as raised:
        one.step()
    assert charged(raised.value) == 0


def test_a_trial_that_saves_nothing_before_its_machine_goes_is_charged(
    tmp_path: Path, fake: Callable[..., FakeRun]
) -> None:
    """Else one that always lands on such a machine would begin for ever."""
    fake([5], asked=DRAIN)
    one = trial(tmp_path)
    run_with(one.root, 7)  # of an earlier attempt
    one.origin = Origin(one.root, 5)
    one.step()
    with pytest.raises(Stopped) as raised:
        one.step()
    assert charged(raised.value) == 1


def charged(error: Exception) -> int:
    """Failures that Ray Tune counts when a trial's method raises this in its actor."""
    import pickle

    from ray.exceptions import RayTaskError
    from ray.tune.experiment import Trial as OfTuneItself

    sent = pickle.loads(pickle.dumps(RayTaskError("step", "Traceback", error, "x", 1, "127.0.0.1")))
    told = SimpleNamespace(run_metadata=SimpleNamespace(num_failures=0, invalidate_cache=lambda: None))
    told.is_restoring, told.local_path = False, None
    told._handle_ray_actor_error = lambda e: OfTuneItself._handle_ray_actor_error(told, e)
    told._handle_ray_task_error = lambda e: OfTuneItself._handle_ray_task_error(told, e)
    OfTuneItself.handle_error(told, sent.as_instanceof_cause())
    return int(told.run_metadata.num_failures)


def test_steps_saved_count_on_through_the_stages(tmp_path: Path) -> None:
    stages = load(recipe(tmp_path, stages=[{"name": "a"}, {"name": "b"}]), EVERY)
    assert steps_saved(stages, tmp_path / "x") == 0
    run_with(tmp_path / "x/1-a", 10, 20)
    assert steps_saved(stages, tmp_path / "x") == 20
    run_with(tmp_path / "x/2-b", 5)
    assert steps_saved(stages, tmp_path / "x") == 25
    assert steps_saved(load(recipe(tmp_path), EVERY), tmp_path / "x/1-a") == 20


def test_tune_s_stop_is_a_clean_one(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([5], waits=True)
    one = trial(tmp_path)
    one.step()
    one.cleanup()
    assert one.run is not None
    assert not one.run.running
    assert isinstance(one.run.error, Stopped)


def test_a_run_that_is_over_is_not_asked_to_stop(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    """It only writes its last checkpoint."""
    fake([5])
    one = trial(tmp_path)
    one.step()
    one.told = {"step": 20}
    one.cleanup()
    assert one.run is not None
    assert not one.run.stop.is_set()


def test_the_whole_sweep_s_stop_reaches_the_trial(
    tmp_path: Path, fake: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake([5], waits=True)
    one = trial(tmp_path)
    one.step()
    monkeypatch.setattr("rlkd.sweep.trial.END_S", 0.0)  # then its driver would end it
    (tmp_path / "sweep" / STOP).touch()
    with pytest.raises(Stopped):
        one.step()


def test_a_checkpoint_is_a_reference(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([5], waits=True)
    one, folder = trial(tmp_path), tmp_path / "checkpoint"
    folder.mkdir()
    one.step()
    one.save_checkpoint(str(folder))
    assert [p.name for p in folder.iterdir()] == ["rlkd.json"]
    other = trial(tmp_path)
    other.load_checkpoint(str(folder))
    assert other.origin == Origin(one.root, 5)
    assert other.told[METRIC] == 0.05  # for a run that has nothing left to do
    one.cleanup()


def test_a_killed_trial_goes_on_by_its_own_ledger(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    run, one = fake([20]), trial(tmp_path)
    run_with(one.root, 5, 10)
    evaluated(one.root, 10, 0.1)
    one.origin = Origin(one.root, 5)
    assert one.step()["step"] == 10  # Tune had not heard of it
    assert one.step()["step"] == 20
    assert run.calls[0][0] == "auto"


def test_what_tune_knows_already_is_not_told_again(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    fake([20])
    one = trial(tmp_path)
    run_with(one.root, 5, 10)
    evaluated(one.root, 10, 0.1)
    one.origin = Origin(one.root, 10)
    assert one.step()["step"] == 20


@pytest.mark.parametrize(("value", "steps"), [(1e-4, [5, 10]), (2e-4, [])])
def test_a_run_from_before_tune_s_record_was_lost(
    tmp_path: Path, fake: Callable[..., FakeRun], value: float, steps: list[int]
) -> None:
    """It goes on if it has this trial's values, and is moved away if it has others."""
    fake([20])
    one = trial(tmp_path, {"learner.lr": value})
    run_with(one.root, 5, 10)
    (one.root.parent / ".trial-000.json").write_text('{"learner.lr": 0.0001}')
    assert one.step()["step"] == 20
    assert Store(one.root / "checkpoints").there() == steps
    moved = list(one.root.parent.glob(".old-trial-000-*"))
    assert len(moved) == (0 if steps else 1)


def test_another_trial_s_checkpoint_makes_a_fork(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    run, one = fake([20]), trial(tmp_path, copies=True)
    run_with(one.root, 5, 10)
    donor = run_with(tmp_path / "sweep/runs/trial-001", 10)
    evaluated(one.root, 10, 0.1)
    one.origin = Origin(donor, 10)
    assert one.step()["step"] == 20
    ((resume, stages),) = run.calls
    assert resume == "10"
    assert (stages[0].config.checkpoint.every, stages[0].config.checkpoint.keep) == (5, 4)
    assert json.loads((one.root / "run.json").read_text())["lineage"][0]["from"] == str(donor)


@pytest.mark.parametrize("held_by", [lambda run: lease(run), lambda run: elsewhere(run, 0.0)], ids=["here", "there"])
def test_a_copy_waits_for_the_process_that_still_saves(
    tmp_path: Path, fake: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch, held_by: Callable[[Path], None]
) -> None:
    """Tune starts a copy while the process that it stops is saving: what that one commits must not be gone on with."""
    monkeypatch.setattr(follow, "LOOK_FAR_S", 0.05)
    run, one = fake([20]), trial(tmp_path, copies=True)
    held_by(one.root)
    run_with(one.root, 5, 10)
    one.origin = Origin(run_with(tmp_path / "sweep/runs/trial-001", 10), 10)

    def saves_and_ends() -> None:
        saved(Store(one.root / "checkpoints"), 30, attempt=1)
        (one.root / ".lease").unlink()

    threading.Timer(0.5, saves_and_ends).start()
    assert one.step()["step"] == 20
    assert run.calls[0][0] == "10"
    assert Store(one.root / "checkpoints").there() == [10]


def test_no_copy_is_made_in_a_folder_that_somebody_holds(
    tmp_path: Path, fake: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was waited for in vain: it is tried again by Tune, and the folder is as it was."""
    monkeypatch.setattr("rlkd.sweep.trial.wait_for_the_other", lambda *_: None)
    run, one = fake([20]), trial(tmp_path, copies=True)
    lease(one.root)
    run_with(one.root, 5, 15)
    one.origin = Origin(run_with(tmp_path / "sweep/runs/trial-001", 10), 10)
    with pytest.raises(PreflightError, match="another process works in this folder"):
        one.step()
    assert run.calls == []
    assert Store(one.root / "checkpoints").there() == [5, 15]
    assert "lineage" not in json.loads((one.root / "run.json").read_text())


@pytest.mark.parametrize(
    ("later", "resume"),
    [
        ({}, "10"),
        ({30: 1}, "10"),  # of the attempt before the copy: the trial's own old weights
        ({25: 2}, "auto"),
        ({25: 2, 30: 1}, "25"),
        ({25: 1, 30: 2}, "auto"),
    ],
)
def test_a_copy_goes_on_from_what_it_saved_itself(
    tmp_path: Path, fake: Callable[..., FakeRun], later: dict[int, int], resume: str
) -> None:
    """Started again after a failure: a later checkpoint is its own if an attempt after the copy wrote it."""
    run, one = fake([20]), trial(tmp_path, copies=True)
    run_with(one.root, 5)
    one.origin = Origin(run_with(tmp_path / "sweep/runs/trial-001", 10), 10)
    assert forked(one.origin, one.root, one.given) == 10
    for step, attempt in later.items():
        saved(Store(one.root / "checkpoints"), step, attempt=attempt)
    one.step()
    assert run.calls[0][0] == resume
    assert len(json.loads((one.root / "run.json").read_text())["lineage"]) == 1


def test_a_copy_that_was_pruned_by_who_came_before_is_made_again(tmp_path: Path) -> None:
    donor, own = run_with(tmp_path / "donor", 10), run_with(tmp_path / "own", 5)
    forked(Origin(donor, 10), own, {})
    saved(Store(own / "checkpoints"), 30, attempt=1)
    Store(own / "checkpoints").drop(10)
    assert forked(Origin(donor, 10), own, {}) == 10
    assert Store(own / "checkpoints").there() == [10]


def test_checkpoints_say_which_attempt_wrote_them(tmp_path: Path) -> None:
    async def facts() -> Any:
        return job.checkpoints(load(recipe(tmp_path))[0].config, tmp_path, lambda *_, **__: None, 3).facts

    assert asyncio.run(facts())["attempt"] == 3


def test_values_are_kept_within_their_distribution_and_sections_are_joined() -> None:
    plan = Plan("r", (), "", specs={"learner.lr": Spec("uniform", (1, 2))})
    assert plan.values({"learner": {"lr": 7.0}, "seed": 3}) == {"learner.lr": 2.0, "seed": 3}


def test_the_remote_store_of_a_trial_is_its_sweep_s(tmp_path: Path, fake: Callable[..., FakeRun]) -> None:
    run, one = fake([20]), trial(tmp_path, {"checkpoint.remote": f"file://{tmp_path}/far/"})
    one.step()
    assert run.calls[0][1][0].config.checkpoint.remote == f"file://{tmp_path}/far/sweep"


def test_trainable_checks_the_recipe_at_once(tmp_path: Path) -> None:
    made = trainable(recipe(tmp_path), EVERY, runs=tmp_path / "runs")
    assert made.plan.runs == str(tmp_path / "runs")
    assert made.plan.stages({"learner.lr": 3e-4})[0].config.learner.lr == 3e-4
    with pytest.raises(ConfigError, match="must be above 0"):
        trainable(recipe(tmp_path), ["learner.lr=-1"])


# --- resources


def test_roles_find_their_place_in_a_trial_s_group() -> None:
    """Not the first, in which the trial itself is; the smallest that is large enough."""
    specs = [{"CPU": 4.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}]
    wanted = [
        Bundle("learner-0", {"CPU": 1.0, "GPU": 1.0}),
        Bundle("rollout-0", {"CPU": 1.0, "GPU": 4.0}),
        Bundle("reward-0", {"CPU": 1.0}),
    ]
    assert [b.role for b in seated(wanted, specs)] == ["", "rollout-0", "learner-0", "reward-0"]
    with pytest.raises(PreflightError, match="rollout-1 needs 1 CPU, 4 GPU"):
        seated([*wanted, Bundle("rollout-1", {"CPU": 1.0, "GPU": 4.0})], specs)


def test_stages_share_a_group_that_each_fits_into() -> None:
    together = resources._together([[{"CPU": 0.1}], [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5}]])
    assert together == [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5}]


# --- search


class OfTune:
    """A trial as Tune's schedulers see it."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"x_{number:05d}"


def test_asha_remembers_what_was_told_before_a_restore() -> None:
    """Without its memory the third trial, the worst at step 5, would be the first and go on."""
    past = {"x_00000": {5: 0.9}, "x_00001": {5: 0.8}}

    def verdict(remembered: dict[str, dict[int, float]]) -> str:
        asha = search.Asha(
            lambda t: remembered.get(t.trial_id, {}), time_attr="step", metric=METRIC, mode="max", grace_period=5,
            max_t=20, reduction_factor=2,
        )  # fmt: skip
        trials = [OfTune(n) for n in range(3)]
        for one in trials:
            asha.on_trial_add(None, one)
        return str(asha.on_trial_result(None, trials[2], {"step": 5, METRIC: 0.1}))

    assert verdict(past) == "STOP"
    assert verdict({}) == "CONTINUE"


def test_pbt_s_numbers_stay_within_the_space() -> None:
    specs = {"a": Spec("loguniform", (1e-5, 1e-3)), "b": Spec("randint", (2, 9))}
    assert search.inside(specs, {"a": 1.2e-3, "b": 9.6, "c": "x"}) == {"a": 1e-3, "b": 8, "c": "x"}


class Ended(OfTune):
    """A trial as Tune's callbacks see it."""

    def __init__(self, **last: Any) -> None:
        super().__init__(0)
        self.last_result, self.config = {"step": 5, METRIC: 0.25, "done": True, **last}, {"learner.lr": 1e-4}

    def __str__(self) -> str:
        return "trial-000"

    def is_finished(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({}, ["step 5: eval/pass@1 0.25", "stopped by the scheduler"]),
        ({"whole": True}, ["step 5: eval/pass@1 0.25; done"]),
        ({"failed": "diverged"}, ["failed: diverged"]),
    ],
)
def test_what_is_said_of_a_trial_s_end(
    last: dict[str, Any], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Tune marks those that its scheduler stops as done, too."""
    one, told = Ended(**last), Told(METRIC, 8)
    told.on_trial_result(1, [one], one, one.last_result)
    told.on_trial_complete(1, [one], one)
    assert capsys.readouterr().err.splitlines() == [
        *(f"[trial-000] {text}" for text in says),
        "[sweep] 1 of 8 trials have ended",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Failure # 1 (occurred at x)\nray::rlkd_trial.train()\n  File\nRuntimeError: a bug\n", "RuntimeError: a bug"),
        ("Failure # 1 (x)\nray::a\nE: a\nFailure # 2 (x)\nThe actor died unexpectedly.\n\tpid: 3\n",
         "The actor died unexpectedly."),
        ("", "no error was given"),
    ],
)  # fmt: skip
def test_why_a_trial_was_lost(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "error.txt").write_text(text)
    assert why_lost(str(tmp_path / "error.txt")) == says
    assert why_lost(None) == "no error was given"


def test_optuna_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PreflightError, match="optuna is not installed") as error:
        search.algorithm(read(tmp_path, "sweep: {search: optuna}\nlearner.lr: {uniform: [1e-6, 1e-4]}\n"))
    assert "space.yaml:1" in str(error.value)


# --- what came out


def rows() -> list[Row]:
    return [
        Row("trial-000", {"learner.lr": 1e-4, "algorithm.norm": "token"}, "done", 20, 0.5, {0: 0.1, 20: 0.5}),
        Row("trial-001", {"learner.lr": 1e-3, "algorithm.norm": "seq"}, "stopped", 5, 0.2, {0: 0.1, 5: 0.2}),
        Row("trial-002", {"learner.lr": 1e-2, "algorithm.norm": "seq"}, "failed", 3, math.nan, {}, "RLKD-T001: <nan>"),
        Row("trial-003", {"learner.lr": 2e-3, "algorithm.norm": "seq"}, "failed", 3, 0.9, {}, "diverged"),
    ]


def test_the_best_is_none_that_failed() -> None:
    found = table.best(rows(), "max")
    assert found is not None
    assert found.name == "trial-000"
    least = table.best(rows(), "min")
    assert least is not None
    assert least.name == "trial-001"
    assert table.best(rows()[2:], "max") is None


def test_the_table_has_every_trial_and_says_why_one_failed() -> None:
    text = table.text(rows(), METRIC, "max")
    lines = text.splitlines()
    assert lines[0].split() == ["trial", "steps", METRIC, "learner.lr", "algorithm.norm"]
    assert lines[2].startswith("trial-000  done")
    assert "trial-002 failed: RLKD-T001" in text
    assert next(line for line in lines if line.startswith("trial-002  ")).split()[3] == "–"


def test_the_command_of_the_best_can_be_given_as_it_is(tmp_path: Path) -> None:
    import shlex

    name = recipe(tmp_path)
    values = {"learner.lr": 1.2345678901234567e-05, "algorithm.rollout.samples": 8}
    program, verb, path, *given = shlex.split(table.command(name, EVERY, values, "best"))
    assert (program, verb, path) == ("rlkd", "train", name)
    config = load(path, given)[0].config
    assert (config.name, config.learner.lr) == ("best", 1.2345678901234567e-05)


@pytest.mark.parametrize(
    ("last", "lost", "state"),
    [
        ({"step": 20, METRIC: 0.5, "done": True, "whole": True}, "", "done"),
        ({"step": 5, METRIC: 0.5, "done": True}, "", "stopped"),  # as Tune marks those that its scheduler stops
        ({"step": 5, "failed": "why"}, "", "failed"),
        ({"step": 5, METRIC: 0.5}, "ActorDied", "lost"),
        ({}, "", "unfinished"),
    ],
)
def test_states(tmp_path: Path, last: dict[str, Any], lost: str, state: str) -> None:
    stages = load(recipe(tmp_path), EVERY)
    assert table.row("t", {}, last, lost, stages, METRIC, tmp_path / "none").state == state


def test_curves_are_read_from_the_runs(tmp_path: Path) -> None:
    run = run_with(tmp_path / "trial-000", 5)
    evaluated(run, 0, 0.1)
    evaluated(run, 5, 0.3)
    assert table.curve(load(recipe(tmp_path), EVERY), run, METRIC) == {0: 0.1, 5: 0.3}


def test_the_page_is_whole_and_needs_no_network() -> None:
    from xml.etree import ElementTree

    html = page("s <1>", rows(), METRIC, "max", "trial-000", ["rlkd train x"])
    assert "s &lt;1&gt;" in html
    assert "<nan>" not in html
    assert "src=" not in html
    assert "href=" not in html
    for start in [i for i in range(len(html)) if html.startswith("<svg", i)]:
        picture = ElementTree.fromstring(html[start : html.index("</svg>", start) + 6])
        assert len(picture.findall(".//{*}polyline")) >= 2


def test_a_page_of_one_trial_without_a_value() -> None:
    assert "no trial was evaluated" in page("x", rows()[2:3], METRIC, "min", None, [])


# --- the folder


def test_only_the_same_command_goes_on(tmp_path: Path) -> None:
    name, folder = recipe(tmp_path), tmp_path / "runs/sweep-x"
    space = read(tmp_path, "learner.lr: {uniform: [1e-6, 1e-4]}\n")
    record.refuse_other(folder, name, EVERY, space)
    record.write(folder, name, EVERY, space)
    record.refuse_other(folder, name, EVERY, space)
    other = read(tmp_path, "learner.lr: {uniform: [1e-6, 2e-4]}\nsweep: {trials: 9}\n")
    with pytest.raises(PreflightError, match=r"learner.lr uniform .* → uniform") as error:
        record.refuse_other(folder, name, EVERY, other)
    assert "sweep.trials None → 9" in str(error.value)
    with pytest.raises(PreflightError, match=r"the recipe \(lr: 0.01\)"):
        record.refuse_other(folder, name, [*EVERY, "learner.lr=0.01"], space)


def test_a_sweep_that_was_stopped_before_its_first_trial_may_be_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs/sweep-x"
    folder.mkdir(parents=True)
    for left in (STOP, ".lease.lock"):
        (folder / left).touch()
    record.refuse_other(folder, recipe(tmp_path), EVERY, read(tmp_path, "seed: {choice: [1, 2]}\n"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "runs/small", 5)
    with pytest.raises(PreflightError, match="other things in it"):
        record.refuse_other(folder, recipe(tmp_path), EVERY, read(tmp_path, "seed: {choice: [1, 2]}\n"))


def test_a_record_of_tune_that_a_kill_left_half_written_is_moved_away(tmp_path: Path) -> None:
    assert not record.restorable(tmp_path)
    (tmp_path / "tuner.pkl").touch()
    (tmp_path / "experiment_state-2026-01.json").write_text('{"trial_data": []}')
    assert not record.restorable(tmp_path)  # Tune fails on a record without trials
    (tmp_path / "experiment_state-2026-02.json").write_text('{"trial_data": [["a", "b"]]}')
    (tmp_path / "experiment_state-2026-03.json").write_text('{"trial_data": [["a", ')
    assert record.restorable(tmp_path)
    assert sorted(p.name for p in tmp_path.glob(".bad-*")) == [".bad-experiment_state-2026-03.json"]


def test_names_of_trials() -> None:
    class Named:
        trial_id = "ab12_00003"

    class Drawn:
        trial_id = "7c1fe2a9"

    assert record.name_of(Named()) == "trial-003"
    assert record.name_of(Drawn()) == "trial-7c1fe2a9"


# --- stopping


def interrupted(folder: Path, number: int, in_ray: bool = False) -> None:
    """A sweep that gets this signal."""
    with stopping.saving(folder):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            if in_ray:
                raise KeyboardInterrupt from None
            raise


def lease(run: Path) -> None:
    from dataclasses import asdict

    from rlkd.lease import Holder

    run.mkdir(parents=True, exist_ok=True)
    (run / ".lease").write_text(json.dumps(asdict(Holder.me())))


def test_the_first_signal_waits_for_the_trials(tmp_path: Path) -> None:
    run = tmp_path / "runs/trial-000"
    lease(run)
    threading.Timer(0.3, (run / ".lease").unlink).start()
    with pytest.raises(Stopped, match="every trial has saved"):
        interrupted(tmp_path, signal.SIGTERM)
    assert (tmp_path / STOP).exists()


def test_a_signal_in_the_middle_of_a_call_of_ray(tmp_path: Path) -> None:
    """Ray turns whatever a handler raises into a KeyboardInterrupt of its own."""
    with pytest.raises(Stopped, match="every trial has saved"):
        interrupted(tmp_path, signal.SIGINT, in_ray=True)


def test_an_interrupt_that_nobody_asked_for_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stopping.saving(tmp_path):
        raise KeyboardInterrupt


def test_the_second_one_does_not(tmp_path: Path) -> None:
    lease(tmp_path / "runs/trial-000")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="trial-000 did not save"):
        interrupted(tmp_path, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_it_does_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAVE_S", 0.3)
    lease(tmp_path / "runs/trial-000")
    with pytest.raises(Stopped, match="trial-000 did not save"):
        interrupted(tmp_path, signal.SIGINT)


def elsewhere(run: Path, age: float) -> None:
    """Held by another machine's process, whose last heartbeat is so old."""
    lease(run)
    path = run / ".lease"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another boot", "host": "node-7"}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_who_held_a_trial_s_folder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is alive, or may be: of another machine that is known when its heartbeat has stood still."""
    monkeypatch.setattr(follow, "LOOK_FAR_S", 0.05)

    def waited(run: Path, most: float = 5.0) -> float:
        began = time.monotonic()
        follow.wait_for_the_other(run, 1.0, most)
        return time.monotonic() - began

    assert waited(tmp_path / "none") < 0.1
    elsewhere(tmp_path / "stale", 1.5)
    assert waited(tmp_path / "stale") < 0.1
    elsewhere(tmp_path / "fresh", 0.5)
    assert 0.3 < waited(tmp_path / "fresh") < 2.0
    lease(tmp_path / "here")
    assert 0.3 <= waited(tmp_path / "here", 0.3) < 2.0
    threading.Timer(0.3, (tmp_path / "here/.lease").unlink).start()
    assert 0.2 < waited(tmp_path / "here") < 2.0


# --- the command line


def test_what_is_missing_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rlkd.cli import app

    result = CliRunner().invoke(app, ["sweep", recipe(tmp_path)])
    assert result.exit_code == 2
    bad = space_file(tmp_path, "learner.lrr: {uniform: [1e-6, 1e-4]}\n")
    result = CliRunner().invoke(app, ["sweep", recipe(tmp_path), "--space", bad])
    assert result.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_there_is_told_before_a_trial_starts(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rlkd.cli import app

    good = space_file(tmp_path, "learner.lr: {uniform: [1e-6, 1e-4]}\n")
    path = recipe(tmp_path, model={"path": str(tmp_path / "no-model")})
    result = CliRunner().invoke(app, ["sweep", path, "--space", good])
    assert result.exit_code == 3
    assert not (tmp_path / "runs").exists()
    assert yaml.safe_load(Path(path).read_text())["model"]["path"].endswith("no-model")
