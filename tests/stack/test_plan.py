"""`rlkd plan --check` after real runs: memory within 15 % of what the processes held. Times are printed, not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlkd.models.get import get
from tests.plan_help import CONFIGS

pytestmark = pytest.mark.stack
QUICK = ["schedule.steps=6", "learner.warmup_steps=1", "evaluate.at_start=false", "evaluate.at_end=false",
         "report.tensorboard=false", "checkpoint.every=0"]  # fmt: skip
TWO_RANKS = ["learner.ranks=2", "learner.zero_stage=2"]


@pytest.mark.parametrize(
    "more", [pytest.param([], id="zero-0"), pytest.param(TWO_RANKS, id="zero-2", marks=pytest.mark.long)]
)
def test_predicted_beside_measured(tmp_path: Path, more: list[str]) -> None:
    get("tiny", tmp_path / "tiny")
    recipe = [str(CONFIGS / "grpo-tiny.yaml"), f"model.path={tmp_path / 'tiny'}", f"report.directory={tmp_path}",
              "name=t", *QUICK, *more]  # fmt: skip
    run = [sys.executable, "-m", "rlkd"]
    subprocess.run([*run, "train", *recipe], check=True, timeout=800, capture_output=True)
    check = [*run, "plan", *recipe, "--check", str(tmp_path / "t"), "--no-calibrate", "--json"]
    done = subprocess.run(check, check=True, timeout=200, capture_output=True, text=True)
    found = json.loads(done.stdout)["compared"]
    print(json.dumps(found, indent=1))
    for role in ("learner", "rollout"):
        memory = found[f"memory of a {role}"]
        assert memory["measured"] is not None
        assert memory["predicted"] == pytest.approx(memory["measured"], rel=0.15)
    assert found["step"]["measured"] > 0
