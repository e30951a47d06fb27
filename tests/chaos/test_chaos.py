"""Runs that are killed at random instants end with the ledger of a quiet run. More of it: benchmarks/chaos.py."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlkd.chaos import Chaos, chaos, chosen, compared, flip_a_byte
from rlkd.core.errors import ConfigError
from rlkd.models.get import get
from rlkd.store.manifest import MANIFEST
from rlkd.store.store import Store
from tests.chaos.recipe import recipe

ROOT = Path(__file__).parents[2]
real = [pytest.mark.stack, pytest.mark.chaos, pytest.mark.timeout(1700)]


def marked(function: Callable[..., None]) -> Callable[..., None]:
    for mark in real:
        function = mark(function)
    return function


def command(folder: Path, **changes: object) -> Callable[[str], list[str]]:
    model = get("tiny", folder / "tiny")
    start = [sys.executable, "-m", "tests.chaos.child", "train", str(recipe(folder, model, **changes))]
    return lambda name: [*start, f"name={name}", f"report.directory={folder / 'runs'}"]


@marked
@pytest.mark.faults("F1", "F6", "F8")
def test_workers_and_learner_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    train = command(tmp_path, schedule={"steps": 120, "groups_per_step": 3, "staleness": 1})
    faults = ["rollout", "reward", "learner"]
    found = chaos(train, tmp_path / "runs", faults, 6, 1.0, limit_s=800.0, once_it_moves=True)
    assert found["exit"] == 0, found["text"]
    assert sum(found["faults"].values()) == 6
    assert found["attempts"] == 1
    assert found["steps"] == 120


@marked
@pytest.mark.faults("F9", "F11", "F24", "F69")
def test_the_driver_is_killed_stopped_and_finds_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    train = command(tmp_path, schedule={"steps": 70, "groups_per_step": 3})
    faults = ["driver", "term", "flip"]
    found = chaos(train, tmp_path / "runs", faults, 3, 1.0, limit_s=800.0, seed=37, once_it_moves=True)
    assert found["exit"] == 0, found["text"]
    assert found["faults"] == {"driver": 1, "flip": 1, "term": 1}  # `term` last: it takes its time to end
    assert found["attempts"] == 4


@marked
@pytest.mark.long
@pytest.mark.faults("F8", "F23")
def test_a_rank_dies_in_backward_in_step_and_in_save_and_the_driver_in_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks: the one that is left must not hang. Each of the faults happens once (RLKD_FAULT_ONCE)."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "once").mkdir()
    changes = {"schedule": {"steps": 24, "groups_per_step": 4}, "learner": {"ranks": 2, "zero_stage": 2}}
    train = command(tmp_path, **changes)
    rules = "learner.backward@1:9=kill; learner.step@1:7=kill; learner.save@1:3=kill; commit.before_rename:6=kill"
    environment = ["env", f"RLKD_FAULT={rules}", f"RLKD_FAULT_ONCE={tmp_path / 'once'}"]
    quiet = Chaos(train("quiet"), tmp_path / "runs" / "quiet", (), 0, 1.0)
    quiet.run(tmp_path / "quiet.log", 200.0)
    struck = Chaos([*environment, *train("struck")], tmp_path / "runs" / "struck", (), 0, 1.0)
    struck.run(tmp_path / "struck.log", 350.0)
    assert len(list((tmp_path / "once").iterdir())) == 4, "a fault point was not passed"
    assert struck.attempts == 2
    found = compared(quiet, struck)
    assert found["same_ledger"], found["text"]
    events = [json.loads(line) for line in (tmp_path / "runs" / "struck" / "events.jsonl").read_text().splitlines()]
    assert sum(e["kind"] == "learner_lost" for e in events) == 3


def test_faults_are_named_by_name_or_number() -> None:
    assert chosen("rollout, F9") == ["rollout", "driver"]
    assert "learner" in chosen("")
    with pytest.raises(ConfigError, match="did you mean driver"):
        chosen("drivr")


def lived(folder: Path, rows: list[dict[str, object]], weights: str = "w") -> Chaos:
    """What is left of a run."""
    checkpoint = folder / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text(json.dumps({"facts": {"digests": {"rank-0/weights": weights}}}))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Chaos([], folder, (), 0, 1.0)


def step(number: int, *tickets: int) -> dict[str, object]:
    return {"step": number, "rows": [[t, f"p{t}", t, "trained", 4] for t in tickets]}


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([step(1, 0, 1), step(2, 2, 3)], True),
        ([step(1, 0, 1), step(2, 4, 5), step(1, 0, 1), step(2, 2, 3)], True),  # rolled back, and done again
        ([step(1, 0, 1), step(2, 2, 4)], False),  # 3 was skipped
        ([step(1, 0, 1), step(2, 1, 2)], False),  # 1 was trained twice
        ([step(1, 0, 1)], False),
    ],
)
def test_a_difference_would_be_seen(tmp_path: Path, rows: list[dict[str, object]], same: bool) -> None:
    quiet = lived(tmp_path / "quiet", [step(1, 0, 1), step(2, 2, 3)])
    found = compared(quiet, lived(tmp_path / "other", rows, "other"))
    assert found["same_ledger"] is same
    assert found["exit"] == (0 if same else 1)
    assert not found["same_weights"]


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints")
    for number in (1, 2):
        draft = store.draft(number)
        (draft / "file").write_bytes(os.urandom(100))
        store.commit(draft, number, {})
    for seed in range(20):
        flip_a_byte(tmp_path, random.Random(seed))
        assert store.verify(2) or seed % 2, seed
        assert store.verify(1) == []
        if store.verify(2):
            break
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 1


def test_the_command() -> None:
    """`rlkd chaos` on a recipe, with its own checks of what it is told."""
    done = subprocess.run([sys.executable, "-m", "rlkd", "chaos", "configs/grpo-tiny.yaml", "--faults", "gremlins"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "there is no fault `gremlins`" in done.stderr
