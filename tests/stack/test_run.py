"""Whole runs on the real stack: the command line, Ray actors, vLLM, verifiers' children, DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlkd.models.get import get

pytestmark = pytest.mark.stack
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


def rlkd(*arguments: str, cwd: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlkd", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def recipe(folder: Path, model: Path, **changes: Any) -> Path:
    base: dict[str, Any] = {
        "name": "t",
        "model": {"path": str(model)},
        "data": {
            "train": {"kind": "arithmetic", "size": 200},
            "holdout": {"kind": "arithmetic", "size": 16, "split": "holdout"},
        },
        "algorithm": {"name": "grpo", "rollout": {"samples": 4}},
        "rewards": {"arithmetic": {}},
        "schedule": {"steps": 2, "groups_per_step": 4},
        "sampler": {"max_tokens": 40, "kv_cache_gib": 0.25},
        "learner": {"lr": 1e-4, "max_tokens": 1024},
        "report": {"directory": str(folder / "runs")},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def rows(folder: Path, name: str = "t") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.faults("F53")
def test_train_export_eval(tmp_path: Path, tiny: Path) -> None:
    """Two steps of GRPO with a reference on vLLM and DeepSpeed; then its model is exported and evaluated."""
    path = recipe(tmp_path, tiny, algorithm={"name": "grpo", "beta": 0.01, "rollout": {"samples": 4}})
    done = rlkd("train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pass@1" in done.stdout
    steps = rows(tmp_path)
    assert [r["step"] for r in steps] == [1, 2]
    assert all(r["mismatch/max"] < 1e-3 for r in steps), "sampler and learner disagree"
    assert steps[0]["kl_reference"] == pytest.approx(0, abs=1e-5)
    assert steps[1]["kl_reference"] > 0
    assert all(r["batch/samples"] == 16 for r in steps)
    run = tmp_path / "runs" / "t"
    assert len((run / "samples" / "step-000001.jsonl").read_text().splitlines()) == 4
    assert (run / "reward.svg").read_text().startswith("<svg")
    exported = rlkd("export", str(run), str(tmp_path / "out"), cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    judged = rlkd("eval", str(tmp_path / "out"), str(path), "--json", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr[-3000:]
    assert 0 <= json.loads(judged.stdout)["eval/pass@1"] <= 1


@pytest.mark.faults("F56")
def test_steps_without_a_signal_leave_the_weights_and_are_told(tmp_path: Path, tiny: Path) -> None:
    """Nobody is right with one token. The run goes on after its first steps, and after a resume."""
    path = recipe(
        tmp_path, tiny, algorithm={"name": "dapo", "rollout": {"samples": 2}},
        schedule={"steps": 2, "groups_per_step": 2, "max_turned_away": 1, "on_no_signal": "skip_step"},
        sampler={"max_tokens": 1, "engine": "hf"}, evaluate={"at_start": False, "at_end": False},
    )  # fmt: skip
    digests = []
    for steps in (2, 3):
        done = rlkd("train", str(path), f"schedule.steps={steps}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("this step is without any: the weights stay as they are") == (2 if steps == 2 else 1)
        assert "too hard: take easier prompts" in done.stdout
        driver = json.loads((tmp_path / f"runs/t/checkpoints/step-{steps:06d}/MANIFEST.json").read_text())
        digests.append({k: v for k, v in driver["facts"]["digests"].items() if k.endswith("weights")})
    assert digests[0] == digests[1]
    assert [(r["step"], r["turned_away/all wrong"]) for r in rows(tmp_path)] == [(1, 3.0), (2, 3.0), (3, 3.0)]
    ledger = [json.loads(line) for line in (tmp_path / "runs/t/ledger.jsonl").read_text().splitlines()]
    assert [row[0] for step in ledger for row in step["rows"]] == list(range(9))


def begun(path: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlkd", "train", str(path)],
        cwd=path.parent,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen[str], happened: Callable[[], bool], seconds: float = 200) -> None:
    """Wait for something that a running program does."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.stderr.read()[-3000:] if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_steps(folder: Path, n: int) -> Callable[[], bool]:
    metrics = folder / "runs" / "t" / "metrics.jsonl"
    return lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= n


def exit_of(folder: Path, attempt: int) -> dict[str, Any]:
    path = folder / "runs" / "t" / "attempts" / f"{attempt:04d}" / "exit.json"
    return dict(json.loads(path.read_text()))


LONG: dict[str, Any] = {
    "schedule": {"steps": 500, "groups_per_step": 4, "on_no_signal": "skip_step"},  # cut answers earn nothing
    "sampler": {"max_tokens": 16, "engine": "hf"},
    "evaluate": {"at_start": False, "at_end": False},
    "curriculum": {"name": "difficulty", "low": 0.0, "high": 1.0},
}


@pytest.mark.faults("F11", "F26", "F27", "F60", "F69")
def test_sigterm_saves_and_the_same_command_continues(tmp_path: Path, tiny: Path) -> None:
    """And what is not the same run, or is not alone, is refused."""
    path = recipe(tmp_path, tiny, **LONG)
    process = begun(path)
    until(process, has_steps(tmp_path, 3))
    second = rlkd("train", str(path), cwd=tmp_path)
    assert second.returncode == 3, second.stderr[-3000:]
    assert f"another process works in this folder: pid {process.pid} on this machine" in second.stderr
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as Kubernetes and Ray may
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said[-3000:]
    saved = sorted((tmp_path / "runs" / "t" / "checkpoints").glob("step-*/MANIFEST.json"))
    step = int(saved[-1].parent.name.removeprefix("step-"))
    assert step >= 3
    assert "press Ctrl-C to stop without saving" in said
    assert f"SIGTERM: saved step {step} of 500" in said
    assert f"Give the same command again:\n  rlkd train {path}\n" in said
    end = exit_of(tmp_path, 1)
    assert (end["code"], end["class"], end["step"], end["saved"]) == (75, "preempt", step, step)

    before = (tmp_path / "runs" / "t" / "config.yaml").read_text()
    other = rlkd("train", str(path), "algorithm.name=dapo", cwd=tmp_path)
    assert other.returncode == 7, other.stderr[-3000:]
    assert "algorithm.name   grpo → dapo" in other.stderr
    assert (tmp_path / "runs" / "t" / "config.yaml").read_text() == before
    assert rlkd("train", str(path), "--resume", "never", cwd=tmp_path).returncode == 3

    again = rlkd("train", str(path), f"schedule.steps={step + 2}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"changed: schedule.steps 500 → {step + 2}" in again.stderr
    last = {r["step"]: r["attempt"] for r in rows(tmp_path)}
    assert last[step] == 1
    assert last[step + 1] == last[step + 2] == 4
    assert exit_of(tmp_path, 4)["class"] == "done"


@pytest.mark.faults("F11", "F60")
def test_a_signal_while_the_run_starts_ends_it_at_once(tmp_path: Path, tiny: Path) -> None:
    path = recipe(tmp_path, tiny, **LONG)
    process = begun(path)
    events = tmp_path / "runs" / "t" / "events.jsonl"
    until(process, lambda: events.exists() and "starting" in events.read_text())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said[-3000:]
    assert "SIGTERM: nothing to save; the same command starts again" in said
    assert "Traceback" not in said
    end = exit_of(tmp_path, 1)
    assert (end["code"], end["class"], end["step"], end["saved"]) == (75, "preempt", None, None)


@pytest.mark.faults("F60")
def test_ctrl_c_twice_stops_without_saving(tmp_path: Path, tiny: Path) -> None:
    """While a save hangs: it leaves nothing that is taken for a checkpoint."""
    path = recipe(tmp_path, tiny, **LONG)
    process = begun(path, RLKD_FAULT="commit.before_rename=hang")
    until(process, has_steps(tmp_path, 3))
    process.send_signal(signal.SIGINT)
    checkpoints = tmp_path / "runs" / "t" / "checkpoints"
    until(process, lambda: any(checkpoints.glob(".tmp-*/MANIFEST.json")), 60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said[-3000:]
    assert "Ctrl-C: saving step" in said
    assert "stopped without saving: the last checkpoint stands (exit 130)" in said
    end = exit_of(tmp_path, 1)
    assert (end["class"], end["code"], end["saved"]) == ("user", 130, None)
    assert end["step"] >= 3
    assert not list(checkpoints.glob("step-*"))


REWARDS = {
    "raises": ("def score(prompt, text):\n    raise KeyError('gold')\n", "KeyError"),
    "hangs": ("def score(prompt, text):\n    while True: pass\n", "timeout"),
    "nan": ("def score(prompt, text):\n    return float('nan')\n", "nan"),
}


@pytest.mark.faults("F42")
@pytest.mark.parametrize(
    ("command", "kind"), [("check", "raises"), ("check", "hangs"), ("check", "nan"), ("train", "raises")]
)
def test_a_broken_reward_is_one_clear_error(tmp_path: Path, tiny: Path, command: str, kind: str) -> None:
    code, says = REWARDS[kind]
    (tmp_path / "mine.py").write_text(code)
    path = recipe(tmp_path, tiny, sampler={"engine": "hf", "max_tokens": 8})
    config = yaml.safe_load(path.read_text())
    config["rewards"] = {"mine.py:score": {}}
    config["verifier"] = {"timeout_s": 1.0}
    path.write_text(yaml.safe_dump(config))
    done = rlkd(command, str(path), cwd=tmp_path)
    assert done.returncode == 4, done.stderr[-2000:]
    assert says in done.stderr
    assert "Traceback" not in done.stderr.split("error[")[0]


@pytest.mark.faults("F63")
def test_a_gpu_asked_for_and_not_there(tmp_path: Path, tiny: Path) -> None:
    done = rlkd("train", str(recipe(tmp_path, tiny)), "model.device=cuda", cwd=tmp_path)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "no GPU" in done.stderr or "has a GPU" in done.stderr
    assert "model.device=cpu" in done.stderr


@pytest.mark.faults("F63")
def test_more_workers_than_the_cluster_has_room_for(tmp_path: Path, tiny: Path) -> None:
    done = rlkd("train", str(recipe(tmp_path, tiny)), "sampler.workers=400", "ray.wait_s=3", cwd=tmp_path)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "CPU needed" in done.stderr


def test_no_process_is_left_behind(tmp_path: Path, tiny: Path) -> None:
    path = recipe(tmp_path, tiny, sampler={"engine": "hf", "max_tokens": 16}, schedule={"steps": 1})
    marker = f"RLKD_TEST_MARK={tmp_path}"
    done = subprocess.run([sys.executable, "-m", "rlkd", "train", str(path)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=280, check=False,
                          env={**os.environ, "RLKD_TEST_MARK": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    time.sleep(3)
    left = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in entry.read_bytes():
                left.append((entry.parent / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:
            continue
    assert not left


def test_an_algorithm_and_a_reward_of_ones_own_reach_every_actor(tmp_path: Path, tiny: Path) -> None:
    """The README's worked examples, in a run: both travel to Ray actors by import path."""
    from tests.test_readme import example

    (tmp_path / "rewards_of_mine.py").write_text(example("reward"))
    (tmp_path / "algo_of_mine.py").write_text(example("algorithm"))
    path = recipe(
        tmp_path,
        tiny,
        algorithm={"name": "algo_of_mine:Best", "keep": 0.5},
        sampler={"engine": "hf", "max_tokens": 16},
        schedule={"steps": 1},
        evaluate={"at_start": False, "at_end": False},
    )
    config = yaml.safe_load(path.read_text())
    config["rewards"] = {"rewards_of_mine.py:ends_with_stop": {}}
    path.write_text(yaml.safe_dump(config))
    done = rlkd("train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path)[0]["step"] == 1
