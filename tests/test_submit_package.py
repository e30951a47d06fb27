"""What travels with a job, and what must be there already."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlkd
from rlkd.config.stages import load
from rlkd.core.errors import PreflightError
from rlkd.submit.package import Package, own_modules, packed, rlkd_itself, size_words
from tests.submit_help import recipe


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def made(path: Path, *overrides: str, **options: Any) -> Package:
    return packed(load(path, overrides), path, overrides, **options)


def own(package: Package) -> set[str]:
    """Without rlkd's files and the probe."""
    return {name for name in package.files if not name.startswith("rlkd")}


def problem(path: Path, *overrides: str, **options: Any) -> str:
    with pytest.raises(PreflightError) as error:
        made(path, *overrides, **options)
    return "\n".join(f"{p.code} {p}" for p in error.value.problems)


def test_the_demo_is_its_recipe_and_its_model_is_on_the_nodes(tmp_path: Path) -> None:
    package = made(recipe(tmp_path))
    assert own(package) == {"recipe.yaml"}
    assert package.on_nodes == {"model.path": f"{tmp_path}/models/tiny"}
    assert package.overrides == (f"model.path={tmp_path}/models/tiny", f"report.directory={tmp_path}/runs")
    assert package.run_folder == f"{tmp_path}/runs/demo"


def test_what_was_packed_is_the_same_recipe_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    path = recipe(tmp_path, defaults=["base"], data={"train": {"kind": "jsonl", "path": "prompts.jsonl"}})
    package, here = made(path, "learner.lr=1e-3"), load(path, ["learner.lr=1e-3"])[0].config
    there = tmp_path / "elsewhere"
    there.mkdir()
    package.write(there)
    monkeypatch.chdir(there)
    config = load(package.recipe, package.overrides)[0].config
    assert (config.seed, config.learner, config.data) == (7, here.learner, here.data)
    assert Path(config.data.train.path).is_file()
    assert config.model.path == f"{tmp_path}/models/tiny"


def test_defaults_travel_with_the_recipe_also_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/base.yaml").write_text("defaults: [more]\nseed: 7\n")
    (tmp_path / "shared/more.yaml").write_text("schedule: {steps: 3}\n")
    (tmp_path / "mine").mkdir()
    path = recipe(tmp_path / "mine", defaults=["../shared/base"])
    assert own(made(path)) == {"mine/recipe.yaml", "shared/base.yaml", "shared/more.yaml"}
    monkeypatch.chdir(tmp_path / "mine")
    package = made(Path("recipe.yaml"))
    assert own(package) == {"recipe/mine/recipe.yaml", "recipe/shared/base.yaml", "recipe/shared/more.yaml"}
    assert package.recipe == "recipe/mine/recipe.yaml"
    there = tmp_path / "there"
    package.write(there)
    monkeypatch.chdir(there)
    assert load(package.recipe, package.overrides)[0].config.seed == 7


def test_paths_of_the_nodes_are_looked_for_there(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        model={"path": "/shared/model"},
        data={"train": {"kind": "jsonl", "path": "/shared/train.jsonl"}},
        reference={"path": "../outside/reference"},
    )
    package = made(path)
    outside = str((tmp_path / "../outside/reference").resolve())
    assert package.on_nodes == {
        "model.path": "/shared/model",
        "reference.path": outside,
        "data.train.path": "/shared/train.jsonl",
    }
    assert package.overrides == (f"reference.path={outside}", f"report.directory={tmp_path}/runs")


def test_a_path_from_the_environment_is_the_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/only/here")
    package = made(recipe(tmp_path, model={"path": "${oc.env:MODELS}/tiny"}))
    assert package.on_nodes == {}
    assert "model.path" not in " ".join(package.overrides)


def test_stages_say_their_paths_each(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text("{}\n")
    stages = [
        {"name": "one", "algorithm": {"name": "grpo"}},
        {"name": "two", "algorithm": {"name": "grpo"}, "data": {"train": {"traces": "w.jsonl"}}},
    ]
    package = made(recipe(tmp_path, stages=stages))
    assert package.on_nodes == {"stages.one.model.path": f"{tmp_path}/models/tiny"}
    assert own(package) == {"recipe.yaml", "w.jsonl"}
    assert [s.config.report.directory for s in load("recipe.yaml", package.overrides)] == [f"{tmp_path}/runs"] * 2


def test_a_file_that_is_missing_is_named_with_its_key(tmp_path: Path) -> None:
    text = problem(recipe(tmp_path, data={"train": {"kind": "jsonl", "path": "prompts.jsonl"}}))
    assert "RLKD-E235" in text
    assert "data.train.path: there is no prompts.jsonl here" in text


@pytest.mark.faults("F68")
def test_folders_travel_without_what_is_large_or_private(tmp_path: Path) -> None:
    left_out = (".git/x", "runs/y", "w.safetensors", "__pycache__/z.pyc", "venv/x", ".gitignore", "b/.rayignore")
    for name in ("set/a.arrow", *(f"set/{name}" for name in left_out)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    package = made(recipe(tmp_path, data={"train": {"kind": "huggingface", "path": "set"}}))
    assert own(package) == {"recipe.yaml", "set/a.arrow"}


def test_own_rewards_travel_with_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import helper_of_mine\ndef right(prompt, text):\n    return helper_of_mine.ONE\n"
    )
    (tmp_path / "helper_of_mine.py").write_text("ONE = 1.0\n")
    for name in ("__init__", "good", "late"):
        (tmp_path / "mypackage").mkdir(exist_ok=True)
        (tmp_path / f"mypackage/{name}.py").write_text("def right(prompt, text):\n    return 1.0\n")
    path = recipe(tmp_path, rewards={"rewards.py:right": {}, "mypackage.good:right": {}})
    assert own(made(path)) == {
        "recipe.yaml",
        "rewards.py",
        "helper_of_mine.py",
        "mypackage/__init__.py",
        "mypackage/good.py",
        "mypackage/late.py",
    }


def test_a_reward_of_an_absolute_path_must_be_on_the_nodes(tmp_path: Path, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.mktemp("far") / "far.py"
    file.write_text("def right(prompt, text):\n    return 1.0\n")
    package = made(recipe(tmp_path, rewards={f"{file}:right": {}}))
    assert package.on_nodes[f"rewards.{file}:right"] == str(file)


def test_more_files_by_name_or_pattern(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    for name in ("words/a.txt", "words/b.txt", "list.csv"):
        (tmp_path / name).write_text("x")
    package = made(recipe(tmp_path), include=["words/*.txt", "list.csv"])
    assert own(package) == {"recipe.yaml", "words/a.txt", "words/b.txt", "list.csv"}
    assert "--include nothing*" in problem(recipe(tmp_path), include=["nothing*"])
    assert "--include /etc" in problem(recipe(tmp_path), include=["/etc"])


@pytest.mark.faults("F68")
def test_large_files_are_refused_by_name_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_bytes(b"x" * 3_000_000)
    path = recipe(tmp_path, data={"train": {"kind": "jsonl", "path": "big.jsonl"}})
    text = problem(path, file_limit=2_000_000)
    assert "RLKD-E234" in text
    assert "big.jsonl is 3.0 MB, and a file of the package may have 2.0 MB" in text
    for advice in ("path that every node has", "model.path on the nodes", "checkpoint.remote", "--limit-mb"):
        assert advice in text
    assert made(path, file_limit=4_000_000).size > 3_000_000
    text = problem(path, limit=3_100_000)
    assert "and may have 3.1 MB: big.jsonl (3.0 MB)" in text


def test_rlkd_itself_travels_from_a_checkout_and_can_be_imported(tmp_path: Path) -> None:
    package = made(recipe(tmp_path))
    package.write(tmp_path / "there")
    assert not [name for name in package.files if name.endswith((".safetensors", ".pyc"))]
    script = "import rlkd, importlib.metadata as m; print(rlkd.__file__, m.version('rlkd'))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "there", capture_output=True, text=True, check=True,
        env={"PATH": "", "PYTHONPATH": str(tmp_path / "there")},
    )  # fmt: skip
    assert found.stdout.startswith(str(tmp_path / "there/rlkd/__init__.py"))


def test_rlkd_that_was_installed_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lib/site-packages/rlkd"
    folder.mkdir(parents=True)
    shutil.copy(str(rlkd.__file__), folder / "__init__.py")
    monkeypatch.setattr(rlkd, "__file__", str(folder / "__init__.py"))
    assert rlkd_itself() == {}


def test_modules_that_are_not_of_this_folder_stay_here(tmp_path: Path) -> None:
    assert own_modules(tmp_path) == []


def test_the_digest_is_of_the_files_and_of_the_command(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    first = made(path).digest
    assert made(path).digest == first
    assert made(path, "seed=1").digest != first
    recipe(tmp_path, seed=2)
    assert made(path).digest != first


def test_sizes_in_words() -> None:
    assert [size_words(n) for n in (0, 214_400, 1_000_000, 3_140_000_000)] == ["0 kB", "214 kB", "1.0 MB", "3140.0 MB"]
