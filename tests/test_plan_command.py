"""`rlkd plan` as it is typed: what is printed, refused, compared; nothing is started."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlkd import calibration, plan_command
from rlkd.cli import app
from rlkd.core.errors import PreflightError
from rlkd.plan.known import KNOWN
from rlkd.plan.work import assumed, work_of
from tests.plan_help import CONFIGS, recipe, shape

MEASURED = {"flops": 2e11, "bandwidth": 2e10, "micro_s": 0.01, "layer_s": 1e-3, "token_s": 1e-5, "token_layer_s": 1e-5}
RECIPE = """\
name: mine
model: {path: models/Qwen2.5-7B, device: cuda, context: 8192}
algorithm: {name: grpo}
data:
  train: {kind: arithmetic, size: 1000}
  max_prompt_tokens: 1024
rewards: {arithmetic: {}}
evaluate: {at_start: false, at_end: false}
sampler: {max_tokens: 4096}
learner: {max_tokens: 16384}
"""


def rlkd(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe; nothing is measured, and no cache outside of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_measured", lambda *_: dict(MEASURED))
    monkeypatch.setattr(calibration, "_busy", lambda: 0.0)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def folder(name: str = "models/tiny", model: str = "SmolLM2-135M") -> None:
    Path(name).mkdir(parents=True)
    (Path(name) / "config.json").write_text(json.dumps(dict(KNOWN[model])))


def test_what_cannot_fit_is_refused_and_what_fits_is_offered() -> None:
    done = rlkd("recipe.yaml")
    assert done.exit_code == 3
    assert "error[RLKD-E182]: learner needs" in done.stderr
    assert "what fits:" in done.stderr
    offered = re.findall(r"^ +((?:[a-z]+\.[a-z_]+=\S+ ?)+)", done.stderr, re.MULTILINE)
    assert offered
    for settings in offered[:1]:
        again = rlkd("recipe.yaml", *settings.split())
        assert again.exit_code == 0, (settings, again.stderr)


def test_for_so_many_gpus_with_settings_that_can_be_given_back() -> None:
    done = rlkd("recipe.yaml", "--gpus", "16", "--hardware", "H200", "--price", "3.5", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 16
    assert found["hardware"] == "H200"
    assert found["cost"] == pytest.approx(found["hours"] * 16 * 3.5)
    parts = found["memory"]["learner"]["parts"]
    assert found["memory"]["learner"]["gib"] == pytest.approx(sum(parts.values()))
    given = [f"{k}={str(v).lower()}" for k, v in found["settings"].items()]
    again = json.loads(rlkd("recipe.yaml", *given, "--hardware", "H200", "--json").stdout)
    assert again["seconds"] == found["seconds"]
    assert again["devices"] == 16
    assert again["grace_s"] % 10 == 0


def test_the_text_says_everything() -> None:
    done = rlkd("recipe.yaml", "--gpus", "16", "--price", "3")
    assert done.exit_code == 0, done.stderr
    for words in ("7.62 B parameters", "16 × H100 on 2 nodes", "memory", "weights", "a step, by", "device hours × 3",
                  "checkpoints  106.6 GB each", "grace", "settings"):  # fmt: skip
        assert words in done.stdout, words


def test_a_table_for_1_to_1024(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(2**i for i in range(11)) == plan_command.SCALE
    monkeypatch.setattr(plan_command, "SCALE", (1, 16))
    done = rlkd("recipe.yaml", "--scale", "--price", "2", "schedule.groups_per_step=128")
    assert done.exit_code == 0, done.stderr
    numbers = [int(line.split()[0]) for line in done.stdout.splitlines()[2:]]
    assert numbers == [1, 16]


def test_a_recipe_for_this_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder()
    assert rlkd(str(CONFIGS / "grpo-tiny.yaml")).exit_code == 0
    assert len(list(Path("cache").glob("*.json"))) == 1
    calls: list[int] = []
    monkeypatch.setattr(calibration, "_measured", lambda *_: calls.append(1) or dict(MEASURED))
    assert rlkd(str(CONFIGS / "grpo-tiny.yaml")).exit_code == 0
    assert not calls
    assert rlkd(str(CONFIGS / "grpo-tiny.yaml"), "--again").exit_code == 0
    assert len(calls) == 1
    next(Path("cache").glob("*.json")).write_text("{")
    assert rlkd(str(CONFIGS / "grpo-tiny.yaml")).exit_code == 0
    assert len(calls) == 2


def test_what_was_measured_on_a_busy_machine_is_told_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    folder()
    monkeypatch.setattr(calibration, "_busy", lambda: 0.7)
    done = rlkd(str(CONFIGS / "grpo-tiny.yaml"))
    assert done.exit_code == 0
    assert "others use 70% of this machine" in done.stderr
    assert not list(Path(".").glob("cache/*.json"))


def test_stages_are_planned_one_by_one() -> None:
    folder()
    done = rlkd(str(CONFIGS / "sft-then-grpo-tiny.yaml"), "--no-calibrate")
    assert done.exit_code == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("stage ")] == ["stage sft", "stage rl"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("nowhere.yaml",), 2, "nowhere.yaml"),
        ((), 2, "RLKD-C433"),
        (("recipe.yaml", "--hardware", "H1000"), 2, "did you mean H100"),
        (("recipe.yaml", "--gpus", "0"), 2, "RLKD-C431"),
        (("recipe.yaml", "--gpus", "4", "--hardware", "cpu"), 2, "RLKD-C431"),
        (("recipe.yaml", "--price", "-1"), 2, "RLKD-C432"),
        (("recipe.yaml", "--answer-tokens", "nan"), 2, "RLKD-C432"),
        (("recipe.yaml", "--prompt-tokens", "inf"), 2, "RLKD-C432"),
        (("recipe.yaml", "model.path=models/mine"), 3, "RLKD-E180"),
        (("recipe.yaml", "--check", "nowhere"), 3, "RLKD-E184"),
        (("--check", "nowhere"), 3, "RLKD-E131"),
        (("recipe.yaml", "--gpus", "1", "--hardware", "RTX4090"), 3, "RLKD-E182"),
    ],
)
def test_bad_input_is_one_clear_error(words: tuple[str, ...], code: int, says: str) -> None:
    done = rlkd(*words)
    assert done.exit_code == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def rows(run: Path, count: int, **more: float) -> None:
    run.mkdir()
    row = {"batch/tokens": 640.0, "batch/samples": 32.0, "tokens_per_second": 64.0, "memory/learner_peak_gib": 4.0,
           "seconds/step": 10.0, "seconds/rollout": 3.0, "seconds/learn": 6.0, "seconds/sync": 1.0}  # fmt: skip
    lines = [json.dumps({**row, "step": i + 1, **(more if i < 2 else {})}) for i in range(count)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_predicted_beside_measured() -> None:
    folder("models/smollm2")
    rows(Path("run"), 6, **{"seconds/step": 99.0, "memory/learner_peak_gib": 3.0})
    done = rlkd(str(CONFIGS / "grpo-smollm2.yaml"), "--check", "run", "--prompt-tokens", "50", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["compared"]
    assert found["step"]["measured"] == 10.0  # the first two are left out
    assert found["memory of a learner"]["measured"] == 4.0  # the most of all steps
    assert found["memory of a rollout"]["measured"] is None
    work = work_of(recipe("grpo-smollm2"), assumed(recipe("grpo-smollm2"), shape("SmolLM2-135M"), 50.0, 20.0))
    assert found["learn"]["predicted"] == pytest.approx(
        0.01 + 30e-3 + work.computed * 31e-5 + 28 * 134_515_008 / 2e10, rel=0.01
    )
    text = rlkd(str(CONFIGS / "grpo-smollm2.yaml"), "--check", "run", "--prompt-tokens", "50").stdout
    assert "unknown" in text
    assert re.search(r"step +\d.*10\.00 s +[+-]\d+%", text)


@pytest.mark.parametrize("content", ["", '{"step": 1, "loss": 0.5, "batch/tokens": null}\n'])
def test_a_run_that_measured_nothing_cannot_be_compared(content: str) -> None:
    folder("models/smollm2")
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text(content)
    done = rlkd(str(CONFIGS / "grpo-smollm2.yaml"), "--check", "run", "--no-calibrate")
    assert done.exit_code == 3
    assert "RLKD-E184" in done.stderr
    assert "no step" in done.stderr


def test_a_stage_is_compared_with_its_own_settings() -> None:
    """Stage `sft` of the recipe samples nothing; stage `rl` does."""
    folder()
    rows(Path("sft"), 6)
    rows(Path("rl"), 6)
    for stage, samples in (("sft", False), ("rl", True)):
        words = [str(CONFIGS / "sft-then-grpo-tiny.yaml"), "--check", stage, "--no-calibrate", "--json"]
        found = json.loads(rlkd(*words).stdout)["compared"]
        assert (found["rollout"]["predicted"] > 0) is samples


def test_a_machine_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures ends with an error, whose last line is told, or does not end."""
    monkeypatch.undo()
    batch = {"groups": 1, "samples": 1, "prompt": 1, "answer": 1}

    def ended(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no room\n")

    def hangs(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", ended)
    with pytest.raises(PreflightError, match="cannot be measured: MemoryError: no room"):
        calibration._measured({}, batch, {}, lambda _: None)
    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(PreflightError, match="not measured within 300 s"):
        calibration._measured({}, batch, {}, lambda _: None)
