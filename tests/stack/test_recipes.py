"""Every tiny recipe makes three steps on the real stack: Ray actors, DeepSpeed, verifiers' children, real teachers.

The recipes' own settings, but for few and short steps, and for sampling by transformers, which starts in a fifth of
vLLM's time (tests/stack/test_run.py and test_vllm.py have vLLM).
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlkd.config.stages import load
from rlkd.core.types import Signal
from rlkd.models.get import get

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]  # of one test: the first one trains the teacher, too
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
STEPS = 3
STAGED = ("sft-then-grpo-tiny", "grpo-then-kdrl-tiny")
RECIPES = sorted(path.stem for path in CONFIGS.glob("*-tiny.yaml") if path.stem not in STAGED)
SHORT = (
    f"schedule.steps={STEPS}",
    "schedule.groups_per_step=2",
    "algorithm.rollout.samples=4",
    "sampler.engine=hf",
    "data.train.size=200",
    "learner.warmup_steps=0",
    "evaluate.at_start=false",
    "evaluate.at_end=false",
    "report.tensorboard=false",
    "ray.wait_s=60",
)
MORE = {  # so that six groups are enough to see help: hard problems, and only right demonstrations of them
    "ampo-tiny": ("data.train.options.carries=3", "data.train.options.forgets=0"),
    "thinktuning-tiny": ("teachers.twin.writer.engine=hf",),
}
ROLES = {  # of the actors that an algorithm asks for
    Signal.REFERENCE: "reference",
    Signal.TEACHER: "teacher:",
    Signal.TEACHER_TOPK: "teacher:",
    Signal.TEACHER_TEXT: "writer:",
}


@dataclass(frozen=True)
class Models:
    tiny: Path
    teacher: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Kept between sessions where RLKD_TEST_MODELS names a directory: the teacher takes a minute or two."""
    kept = os.environ.get("RLKD_TEST_MODELS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("models")
    return Models(get("tiny", tmp_path_factory.mktemp("models") / "tiny"), get("tiny-teacher", folder / "tiny-teacher"))


class Child:
    """tests/stack/recipes_child.py. One that was left in the middle of a recipe is ended, and another started."""

    def __init__(self, log: Path) -> None:
        self.log, self.process, self.busy = log, None, False

    def train(self, recipe: str, *overrides: str) -> dict[str, Any]:
        if self.process is None or self.busy or self.process.poll() is not None:
            self.close()
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.busy = True
        asked = {"recipe": str(CONFIGS / f"{recipe}.yaml"), "overrides": overrides}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        self.busy = False
        assert line, self.log.read_text(errors="replace")[-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.stack.recipes_child"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def close(self) -> None:
        if self.process is None:
            return
        if not self.busy and self.process.stdin is not None:
            self.process.stdin.close()
        else:
            self.process.kill()
        self.process.wait(60)
        self.process, self.busy = None, False


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    made = Child(tmp_path_factory.mktemp("child") / "log")
    yield made
    made.close()


def overrides(recipe: str, models: Models, folder: Path) -> list[str]:
    """Short, with the models of the tests."""
    given = [*SHORT, *MORE.get(recipe, ()), f"model.path={models.tiny}", f"report.directory={folder}"]
    names = {name for stage in load(CONFIGS / f"{recipe}.yaml") for name in stage.config.teachers}
    prefix = "stages.kd." if recipe in STAGED else ""
    return given + [f"{prefix}teachers.{name}.path={models.teacher}" for name in sorted(names)]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def model_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS:06d}" / "hf"


def changed(before: Path, after: Path) -> bool:
    """Whether any weight differs. The folders may hold different kinds of floats."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return any(np.abs(old[name].astype(np.float32) - new[name].astype(np.float32)).max() > 1e-7 for name in old)


def test_weights_that_did_not_change_are_seen(models: Models) -> None:
    assert not changed(models.tiny, models.tiny)
    assert changed(models.tiny, models.teacher)


@pytest.mark.parametrize("recipe", RECIPES)
def test_three_steps(recipe: str, models: Models, child: Child, tmp_path: Path, record_property: Any) -> None:
    given = overrides(recipe, models, tmp_path)
    done = child.train(recipe, *given)
    record_property("seconds", done["seconds"])
    assert done["code"] == 0, done["error"]
    run = tmp_path / recipe
    steps = rows(run)
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps)  # of two groups without contrast it is 0
    assert changed(models.tiny, model_of(run))

    [stage] = load(CONFIGS / f"{recipe}.yaml", given)
    needs = stage.config.algorithm.needs
    started = {event["text"] for event in events(run) if event["kind"] == "starting"}
    assert all(any(text.startswith(ROLES[signal]) for text in started) for signal in needs)
    if Signal.TEACHER in needs:
        assert steps[0]["kl_teacher"] > 0.01, "student and teacher are different models"
        assert steps[0]["teacher_missing"] < 0.5
    if Signal.TEACHER_TOPK in needs:
        assert steps[0]["divergence"] > 0.001
    if Signal.REFERENCE in needs:
        assert all(math.isfinite(row["margin"]) for row in steps)
    if stage.config.data.train.options.get("demonstrations") or Signal.TEACHER_TEXT in needs:
        assert sum(row["guided"] for row in steps) > 0
    else:
        assert all(row["guided"] == 0 for row in steps)


def test_stages_and_the_same_command_again(models: Models, child: Child, tmp_path: Path) -> None:
    """SFT, then GRPO that cannot start: the same command without the mistake goes on after SFT, and then is done."""
    recipe = "sft-then-grpo-tiny"
    given = overrides(recipe, models, tmp_path)
    first, second = tmp_path / recipe / "1-sft", tmp_path / recipe / "2-rl"
    broken = child.train(recipe, *given, "stages.rl.model.device=cuda")
    assert broken["code"] == 3, broken["error"]
    assert "GPU" in broken["error"]
    assert [row["step"] for row in rows(first)] == [1, 2, 3]
    assert not (second / "metrics.jsonl").exists() or not rows(second)

    done = child.train(recipe, *given)
    assert done["code"] == 0, done["error"]
    assert [(row["step"], row["attempt"]) for row in rows(first)] == [(1, 1), (2, 1), (3, 1)]  # was not run again
    assert [row["step"] for row in rows(second)] == [1, 2, 3]
    assert all(row["guided"] == 1 for row in rows(first))
    assert all(row["guided"] == 0 for row in rows(second))
    assert str(model_of(first)) in (second / "config.yaml").read_text()
    assert changed(models.tiny, model_of(first))
    assert changed(model_of(first), model_of(second))

    before = (second / "metrics.jsonl").read_bytes()
    again = child.train(recipe, *given)
    assert again["code"] == 0, again["error"]
    assert (second / "metrics.jsonl").read_bytes() == before
    assert again["seconds"] < done["seconds"] / 2


def test_a_stage_with_a_teacher_of_its_own(models: Models, child: Child, tmp_path: Path) -> None:
    recipe = "grpo-then-kdrl-tiny"
    done = child.train(recipe, *overrides(recipe, models, tmp_path))
    assert done["code"] == 0, done["error"]
    alone, taught = rows(tmp_path / recipe / "1-rl"), rows(tmp_path / recipe / "2-kd")
    assert len(alone) == len(taught) == STEPS
    assert "kl_teacher" not in alone[0]
    assert taught[0]["kl_teacher"] > 0.01
