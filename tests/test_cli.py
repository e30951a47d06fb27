"""The command line: what is called with what, exit codes, what is said where."""

import ast
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rlkd
from rlkd import cli, staged
from rlkd.config.load import Loaded
from rlkd.core import errors
from rlkd.report import secrets

RECIPE = """\
model: {path: models/tiny}
algorithm: {name: grpo}
data:
  train: {kind: arithmetic, size: 1000}
  holdout: {kind: arithmetic, size: 50, split: holdout}
rewards: {arithmetic: {}}
"""

Calls = list[tuple[Any, ...]]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return "recipe.yaml"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """rlkd.run and rlkd.models.get that only note how they are called."""
    made: Calls = []

    def noting(name: str, result: Any) -> Callable[..., Any]:
        return lambda *args, **_: made.append((name, *args)) or result

    run = types.ModuleType("rlkd.run")
    run.train = noting("train", 0)  # type: ignore[attr-defined]
    run.check = noting("check", {"text": "in words", "sequences": 128})  # type: ignore[attr-defined]
    run.evaluate = noting("evaluate", {"text": "pass@1 50 %", "pass@1": 0.5})  # type: ignore[attr-defined]
    run.export = noting("export", {"text": "exported", "difference": 0.0})  # type: ignore[attr-defined]
    get = types.ModuleType("rlkd.models.get")
    get.get = noting("get", Path("/models/tiny"))  # type: ignore[attr-defined]
    for name, module in (("run", run), ("models.get", get)):
        parent, _, child = f"rlkd.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"rlkd.{name}", module)
        __import__(parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setattr(staged, "run", run)
    return made


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


def test_train_loads_the_recipe_and_runs_it(recipe: str, calls: Calls) -> None:
    result = invoke("train", recipe, "learner.lr=1e-4", "--name", "mine")
    assert result.exit_code == 0, result.output
    ((name, config, path, resume, accept_new_data),) = calls
    assert (name, path, resume, accept_new_data) == ("train", Path(recipe), "auto", False)
    assert isinstance(config, Loaded)
    assert (config.learner.lr, config.name) == (1e-4, "mine")
    assert config.written.overrides == ("learner.lr=1e-4", "name=mine")


def test_how_to_go_on_and_whether_bit_by_bit(recipe: str, calls: Calls) -> None:
    for step in ("never", "12"):
        assert invoke("train", recipe, "--resume", step, "--accept-new-data", "--deterministic").exit_code == 0
    assert [call[3:] for call in calls] == [("never", True), ("12", True)]
    assert all(call[1].deterministic for call in calls)
    calls.clear()
    result = invoke("train", recipe, "--resume", "newest")
    assert result.exit_code == 2
    assert "--resume newest" in result.stderr
    assert "auto, never, or a step" in result.stderr
    assert not calls


@pytest.mark.usefixtures("calls")
def test_the_exit_code_is_what_train_says(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rlkd.run"], "train", lambda *_, **__: 75)
    assert invoke("train", recipe).exit_code == 75


@pytest.mark.usefixtures("recipe")
@pytest.mark.parametrize(
    ("args", "text", "data"),
    [
        (("check", "recipe.yaml"), "in words\n", {"sequences": 128}),
        (("eval", "runs/x", "recipe.yaml", "seed=2"), "pass@1 50 %\n", {"pass@1": 0.5}),
    ],
)
def test_a_result_is_for_people_or_for_programs(
    calls: Calls, args: tuple[str, ...], text: str, data: dict[str, Any]
) -> None:
    assert invoke(*args).stdout == text
    assert json.loads(invoke(*args, "--json").stdout) == data
    if args[0] == "eval":
        assert [(c[0], c[1].seed, *c[2:]) for c in calls] == [("evaluate", 2, Path("runs/x"), None)] * 2


def test_eval_of_a_run_needs_no_recipe(recipe: str, calls: Calls) -> None:
    """It is the run's own, and what follows are settings."""
    run = Path("runs/x")
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"name": "x", "attempts": []}')
    (run / "config.yaml").write_text(Path(recipe).read_text() + "seed: 5\n")
    for args in ([], ["evaluate.prompts=4"], [recipe, "seed=7"], ["--step", "3"]):
        assert invoke("eval", "runs/x", *args).exit_code == 0
    most = calls[0][1].evaluate.prompts
    assert [(c[1].seed, c[1].evaluate.prompts, c[3]) for c in calls] == [
        (5, most, None), (5, 4, None), (7, most, None), (5, most, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("models/tiny",), "RLKD-C416"),
        (("models/tiny", "seed=1"), "rlkd eval MODEL RECIPE"),
        (("models/tiny", "recipe.yaml", "--step", "3"), "RLKD-C418"),
    ],
)
def test_eval_of_a_model_needs_a_recipe_and_has_no_steps(calls: Calls, args: tuple[str, ...], said: str) -> None:
    result = invoke("eval", *args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not calls


def test_export_and_model_get(calls: Calls) -> None:
    assert invoke("export", "runs/x", "out").exit_code == 0
    assert invoke("export", "runs/x", "out", "--step", "7").stdout == "exported\n"
    assert invoke("model", "get", "tiny", "models/tiny").exit_code == 0
    assert calls == [
        ("export", Path("runs/x"), None, Path("out")),
        ("export", Path("runs/x"), 7, Path("out")),
        ("get", "tiny", Path("models/tiny")),
    ]
    assert json.loads(invoke("export", "runs/x", "out", "--json").stdout) == {"difference": 0.0}
    assert json.loads(invoke("model", "get", "tiny", "models/tiny", "--json").stdout) == {
        "model": "tiny", "directory": "/models/tiny",
    }  # fmt: skip


def test_ckpt_and_why_stuck(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlkd import ckpt, why_stuck

    made: Calls = []
    for name in ("ls", "verify", "pin", "unpin", "prune"):
        told = {"text": name, "exit": 7} if name == "verify" else {"text": name}
        monkeypatch.setattr(ckpt, name, lambda *args, told=told: made.append((told["text"], *args)) or told)
    monkeypatch.setattr(why_stuck, "why_stuck", lambda run: {"text": f"{run.name} waits"})
    run = str(tmp_path)
    assert invoke("ckpt", "ls", run).stdout == "ls\n"
    assert invoke("ckpt", "verify", run).exit_code == 7
    assert invoke("ckpt", "verify", run, "3", "--json").exit_code == 7
    assert invoke("ckpt", "pin", run, "3").exit_code == invoke("ckpt", "unpin", run, "3").exit_code == 0
    assert invoke("ckpt", "prune", run, "--last", "4", "--dry").exit_code == 0
    assert made == [
        ("ls", tmp_path),
        ("verify", tmp_path, None),
        ("verify", tmp_path, 3),
        ("pin", tmp_path, 3),
        ("unpin", tmp_path, 3),
        ("prune", tmp_path, 4, None, None, True),
    ]
    (tmp_path / "stages.json").write_text('{"stages": ["1-sft", "2-rl", "3-more"]}')
    for stage in ("1-sft", "2-rl"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "run.json").write_text("{}")
    assert invoke("why-stuck", run).stdout == "2-rl waits\n"


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.ConfigError("RLKD-C1", "a"), 2, "1 error, nothing was started (exit 2)."),
        (errors.PreflightError("RLKD-E1", "a", "here", "do that"), 3, "  --> here\n  = do that\n"),
        (errors.DataError("RLKD-D1", "a"), 4, "1 error, stopped (exit 4)."),
        (errors.DivergedError("RLKD-T1", "a"), 5, "error[RLKD-T1]: a"),
        (errors.InfrastructureError("RLKD-I1", "a"), 6, "(exit 6)"),
        (errors.CheckpointError("RLKD-K1", "a"), 7, "(exit 7)"),
        (
            errors.Stopped(75, "saved step 3; the same command continues"),
            75,
            "saved step 3; the same command continues",
        ),
        (errors.Stopped(130, "not saved"), 130, "not saved (exit 130)"),
        (KeyboardInterrupt(), 130, "the last checkpoint stands (exit 130)"),
        (ZeroDivisionError("oh"), 1, "ZeroDivisionError: oh\nThis is a bug in rlkd: please report it"),
        (SystemExit(9), 9, ""),
    ],
)
def test_every_error_has_its_exit_code_and_its_words(
    recipe: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr(sys.modules["rlkd.run"], "train", fail)
    result = invoke("train", recipe)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""
    assert ("Traceback" in result.stderr) == isinstance(error, ZeroDivisionError)


@pytest.mark.faults("F65")
def test_no_error_shows_a_secret(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of the environment nor one that stands in the recipe, whatever the error is."""
    monkeypatch.setattr(secrets, "KNOWN", secrets.Secrets())
    monkeypatch.setenv("MY_API_KEY", "hf_TESTSECRETenvironment")
    Path(recipe).write_text(RECIPE + "schedule: {api_key: sk-TESTSECRETrecipe}\n")
    result = invoke("check", recipe, "name=hf_TESTSECRETenvironment/", "sampler.password=TESTSECRETcommand", "--json")
    assert result.exit_code == 2
    assert "unknown key `schedule.api_key`" in result.stderr
    assert "TESTSECRET" not in result.output + result.stderr
    assert "<redacted:MY_API_KEY>" in result.stderr
    assert "<redacted:api_key>" in result.stderr  # the line of the recipe that is shown
    for error in (ZeroDivisionError("at sk-TESTSECRETrecipe"), errors.Stopped(75, "at sk-TESTSECRETrecipe")):

        def fail(*_: Any, error: Exception = error) -> int:
            error.add_note("and sk-TESTSECRETrecipe")
            raise error

        monkeypatch.setattr("rlkd.staged.check", fail)
        Path(recipe).write_text(RECIPE + "# token: sk-TESTSECRETrecipe\n")
        result = invoke("check", recipe)
        assert "at <redacted:" in result.stderr
        assert "and <redacted:" in result.stderr
        assert "TESTSECRET" not in result.output + result.stderr


def test_problems_are_data_with_json(recipe: str, calls: Calls) -> None:
    result = invoke("check", recipe, "seeds=1", "--json")
    assert result.exit_code == 2
    data = json.loads(result.stdout)
    assert data["exit"] == 2
    (problem,) = data["problems"]
    assert problem["code"] == "RLKD-C002"
    assert problem["where"] == "command line: seeds=1"
    assert problem["fix"].startswith("did you mean `seed`?")
    assert "unknown key `seeds`" in result.stderr
    assert not calls


@pytest.mark.parametrize(
    "args", [(), ("train",), ("trian", "x"), ("train", "x", "--nope"), ("model",), ("export", "a")]
)
def test_wrong_usage_exits_with_2(args: tuple[str, ...]) -> None:
    assert invoke(*args).exit_code == 2


# -- the program itself ------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """Of a program that imports this rlkd. PYTHONPATH has no empty part: that would be the current folder."""
    paths = [str(Path(rlkd.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **more}


def rlkd_program(*args: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "rlkd", *args]  # -P: without the current folder, as the console script is
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=120)


def test_a_typo_from_the_shell(recipe: str, tmp_path: Path) -> None:
    done = rlkd_program("train", recipe, "learner.lrr=1", "schedule.steps=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "error[RLKD-C002]: unknown key `learner.lrr`\n"
        "  --> command line: learner.lrr=1\n"
        "  = did you mean `lr`?  (also known here: ranks, betas,"
    )
    assert done.stderr.endswith("2 errors, nothing was started (exit 2).\n")
    assert "\x1b" not in done.stderr  # no colour where there is no terminal


def test_colours_on_a_terminal(recipe: str, tmp_path: Path) -> None:
    done = rlkd_program("train", recipe, "seeds=1", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in done.stderr


def test_an_algorithm_in_the_current_folder_is_found(recipe: str, tmp_path: Path) -> None:
    source = "from dataclasses import dataclass\nfrom rlkd.algorithms.grpo import GRPO\n"
    source += "@dataclass(frozen=True)\nclass Mine(GRPO):\n    name: str = 'mine'\n"
    (tmp_path / "an_algorithm_of_mine.py").write_text(source)
    done = rlkd_program("check", recipe, "algorithm.name=an_algorithm_of_mine:Mine", "seed=-1", cwd=tmp_path)
    assert done.stderr.startswith("error[RLKD-C012]: seed=-1"), done.stderr  # all that is wrong
    assert done.stderr.endswith("1 error, nothing was started (exit 2).\n")


def test_version_and_help_from_the_shell(tmp_path: Path) -> None:
    version, help_ = rlkd_program("--version", cwd=tmp_path), rlkd_program("--help", cwd=tmp_path)
    assert (version.returncode, help_.returncode) == (0, 0)
    assert version.stdout.startswith("rlkd ")
    for command in ("train", "check", "doctor", "eval", "export", "model", "ckpt", "why-stuck"):
        assert f"  {command}" in help_.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rlkd.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'ray', 'vllm', 'transformers', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == []


def test_a_pipe_that_is_closed_is_no_bug(tmp_path: Path) -> None:
    command = ["bash", "-c", f"{sys.executable} -P -m rlkd doctor --json | true"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr
