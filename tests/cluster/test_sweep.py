"""Sweeps on a real Ray cluster of this machine: kills, restores, copies, and what has no room."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sweep as bench
from rlkd.config.stages import load
from rlkd.models import get

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    get.get("tiny", folder)
    return str(folder)


def rlkd(*words: str, timeout: float = 800) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rlkd", *words], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_eight_trials_with_a_trial_and_the_driver_killed(tmp_path: Path, model: str) -> None:
    """The issue's own: the same command goes on, and every trial's ledger is whole."""
    found = bench.kills(tmp_path, model, 8, [])
    assert found["exit"] == 0, found["stderr"][-3000:]
    assert found["seconds"] < 900
    trials = found["trials"]
    assert len(trials) == 8
    assert all(t["whole_ledger"] for t in trials.values()), trials
    assert trials[found["killed_trial"]]["attempts"] >= 2
    assert any(t["steps"] == bench.STEPS for t in trials.values())
    assert any(t["steps"] < bench.STEPS for t in trials.values())  # ASHA stopped some
    folder = tmp_path / "runs" / bench.NAME
    config = load(str(folder / "best.yaml"))[0].config
    assert config.name == "tiny-best"
    command = next(line for line in found["stdout"].splitlines() if line.startswith("rlkd train"))
    assert f"learner.lr={config.learner.lr}" in command
    assert (folder / "report.html").read_text().count("<polyline") >= 8


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_trials_ctrl_c_and_the_same_command(tmp_path: Path, model: str) -> None:
    """Grid search of two; stopped in the first trial's middle: it saves, and the same command finishes both."""
    recipe = bench.recipe(tmp_path, model, schedule={"steps": 8}, evaluate={"every": 4})
    space = tmp_path / "two.yaml"
    space.write_text("sweep: {search: grid}\nlearner.lr: {grid: [1.0e-4, 2.0e-4]}\n")
    command = ["sweep", str(recipe), "--space", str(space), "--name", "two"]
    run = tmp_path / "runs/two/runs/trial-000"
    with subprocess.Popen([sys.executable, "-m", "rlkd", *command], stderr=subprocess.PIPE, text=True) as driver:
        bench.until(lambda: bench.steps(run) >= 2, driver, "step 2")  # type: ignore[arg-type]
        os.kill(driver.pid, signal.SIGINT)
        _, said = driver.communicate(timeout=200)
    assert driver.returncode == 75, said[-3000:]
    assert "every trial has saved" in said
    (end,) = run.glob("attempts/0001/exit.json")
    assert json.loads(end.read_text())["code"] == 75
    saved = json.loads(end.read_text())["saved"]
    result = rlkd(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert sum("done" in line for line in lines if line.startswith("trial-")) == 2
    assert bench.whole(run)
    assert json.loads((run / "attempts/0002/exit.json").read_text())["code"] == 0
    assert saved >= 2
    third = rlkd(*command)  # nothing is left: the table again
    assert third.returncode == 0, third.stderr[-3000:]
    assert third.stdout.splitlines()[:3] == lines[:3]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_pbt_copies_weights_and_ledger(tmp_path: Path, model: str) -> None:
    """Of two trials the worse becomes a copy of the better one, with other settings."""
    recipe = bench.recipe(tmp_path, model, schedule={"steps": 32}, evaluate={"every": 4})  # both must be asked twice
    space = tmp_path / "pbt.yaml"
    space.write_text(
        "sweep: {scheduler: pbt, trials: 2, quantile: 0.5, at_once: 2}\nlearner.lr: {loguniform: [1e-6, 1e-3]}\n"
    )
    result = rlkd("sweep", str(recipe), "--space", str(space), "--name", "pbt", timeout=850)
    assert result.returncode == 0, result.stderr[-3000:]
    runs = sorted((tmp_path / "runs/pbt/runs").glob("trial-*"))
    lineages = {r.name: json.loads((r / "run.json").read_text()).get("lineage", []) for r in runs}
    assert any(lineages.values()), result.stderr[-3000:]
    assert "is a copy: step" in result.stdout
    for run in runs:
        assert max(int(p.name[5:]) for p in run.glob("checkpoints/step-*")) == 32


@pytest.mark.timeout(300)
def test_no_room_for_one_trial(tmp_path: Path, model: str) -> None:
    """Said within the ten seconds that the recipe allows, before any trial starts."""
    recipe = bench.recipe(tmp_path, model, sampler={"workers": 500})
    space = bench.space(tmp_path, 2)
    result = rlkd("sweep", str(recipe), "--space", str(space), timeout=280)
    assert result.returncode == 3
    assert "RLKD-E020" in result.stderr
    assert "CPU needed" in result.stderr
    assert "within 10 s" in result.stderr
    assert not list(tmp_path.glob("runs/*/runs/trial-*"))


@pytest.mark.timeout(900)
def test_rlkd_tune_trainable_in_a_tuner_of_one_s_own(tmp_path: Path, model: str) -> None:
    """Two trials at the same time, each in its own group: neither waits for what the other holds."""
    recipe = bench.recipe(tmp_path, model, schedule={"steps": 4}, evaluate={"every": 2})
    script = f"""
from ray import tune
import rlkd.tune
import ray
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**8)
tuner = tune.Tuner(
    rlkd.tune.trainable({str(recipe)!r}, at_once=2),
    param_space={{"learner.lr": tune.grid_search([1e-4, 2e-4])}},
    tune_config=tune.TuneConfig(metric="eval/pass@1", mode="max"),
    run_config=tune.RunConfig(name="own", storage_path={str(tmp_path / "tune")!r}, verbose=0),
)
for result in tuner.fit():
    print("RESULT", result.error, result.metrics["step"], result.config["learner.lr"], result.checkpoint is not None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = sorted(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert found == ["RESULT None 4 0.0001 True", "RESULT None 4 0.0002 True"], done.stderr[-2000:]
    runs = [path for path in (tmp_path / "tune/own/runs").iterdir() if path.is_dir()]
    assert len(runs) == 2
    assert all(bench.whole(run) for run in runs)
