"""Every recipe of configs/ loads, those of the papers want nothing but their files, and no file there is idle."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rlkd import inputs
from rlkd.algorithms import TABLE
from rlkd.config.load import resolved
from rlkd.config.schema import Source
from rlkd.config.stages import load
from rlkd.core.errors import PreflightError
from rlkd.models.get import MODELS, get

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "sweep")  # those: test_sweep_space.py
PAPERS = [p for p in FILES if p.parent == CONFIGS / "paper"]
RECIPES = [p for p in FILES if p.parent == CONFIGS] + PAPERS
ISSUE = [  # issue 3, point 5
    "kdrl", "kdrl-annealed", "ampo", "thinktuning", "luffy", "opd", "gkd", "sft", "rsft", "dpo", "sft-then-grpo",
    "grpo-then-kdrl",
]  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])\d[\d_.e+-]*(?![\w.])")


def used(path: Path) -> set[Path]:
    """The files that a recipe's `defaults` name, and theirs."""
    names = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    files = {(path.parent / f"{name}.yaml").resolve() for name in names}
    return files.union(*(used(f) for f in files))


def ids(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("kind", ["tiny", "smollm2"])
def test_there_is_a_recipe_for_every_method(kind: str) -> None:
    wanted = {*ISSUE, "grpo"} | ({name.replace("_", "-") for name in TABLE} if kind == "tiny" else set())
    there = {p.stem.removesuffix(f"-{kind}") for p in RECIPES if p.stem.endswith(f"-{kind}")}
    assert there == wanted


def test_the_papers_own_settings_are_there() -> None:
    assert {p.stem.split("-")[0] for p in PAPERS} == {"kdrl", "ampo", "luffy", "thinktuning", "grpo", "dapo"}


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_loads(path: Path, tmp_path: Path) -> None:
    for stage in load(path):
        assert stage.config.name == path.stem  # a run is called as its recipe, unless told otherwise
        again = tmp_path / "config.yaml"
        again.write_text(resolved(stage.config), encoding="utf-8")
        [only] = load(again)
        assert only.config == stage.config


def test_no_file_is_idle() -> None:
    named = set().union(*(used(p) for p in RECIPES))
    assert [p for p in FILES if p not in RECIPES and p.resolve() not in named] == []


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in PAPERS], ids=ids)
def test_its_models_can_be_got(path: Path) -> None:
    """`rlkd model get NAME models/NAME` makes each of them, and the error for a missing one says so."""
    for stage in load(path):
        for model in (stage.config.model.path, *(t.path for t in stage.config.teachers.values())):
            assert model is not None
            assert model in {f"models/{name}" for name in MODELS}


def test_the_error_for_a_missing_teacher_says_what_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    get("tiny", tmp_path / "models" / "tiny")
    [stage] = load(CONFIGS / "kdrl-tiny.yaml")
    with pytest.raises(PreflightError, match="rlkd model get tiny-teacher models/tiny-teacher") as caught:
        inputs.read(stage.config)
    assert "teachers.adder.path" in str(caught.value)


# --- the papers'


@pytest.mark.parametrize("path", PAPERS, ids=ids)
def test_every_number_has_its_source(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        setting, _, comment = line.partition("#")
        if NUMBER.search(setting.partition(":")[2]):
            assert comment.strip(), line


def test_a_number_without_a_source_is_seen() -> None:
    assert NUMBER.search("  lr: 1.0e-6".partition(":")[2])
    assert NUMBER.search("rollout: {samples: 64}".partition(":")[2])
    assert not NUMBER.search("  path: models/Qwen2.5-7B-Instruct".partition(":")[2])


@pytest.mark.parametrize("path", PAPERS, ids=ids)
def test_only_files_are_missing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything `rlkd check` says which model folder is missing; with folders and rows of the right names, all
    that a run reads before it starts is right, and a GPU is all it lacks."""
    monkeypatch.chdir(tmp_path)
    [stage] = load(path)
    config = stage.config
    assert config.model.device == "cuda"
    with pytest.raises(PreflightError, match="RLKD-E110") as caught:
        inputs.read(config)
    assert [p.where for p in caught.value.problems] == ["model.path"]

    long_model(Path(config.model.path))
    for teacher in config.teachers.values():
        if teacher.path is not None:
            long_model(Path(teacher.path))
    write_rows(config.data.train, [f"{i}+{i}=" for i in range(100, 109)])
    write_rows(config.data.holdout, [f"{i}+{i}=" for i in range(109, 112)])
    read = inputs.read(config)
    assert len(read.data.train.prompts) == 9
    assert not read.data.warnings
    helped = config.data.train.demonstrations is not None
    assert all(len(p.demonstrations) == helped for p in read.data.train.prompts)


def long_model(folder: Path) -> None:
    """The tiny student, which says that it takes long texts."""
    get("tiny", folder)
    config = (folder / "config.json").read_text()
    changed = re.sub(r'("max_position_embeddings": )\d+', r"\g<1>131072", config)
    assert changed != config
    (folder / "config.json").write_text(changed)


def write_rows(source: Source | None, prompts: list[str]) -> None:
    """A parquet file with the columns that the recipe names."""
    assert source is not None
    row: dict[str, Any] = {source.answer: "1"}
    if source.demonstrations is not None:
        row[source.demonstrations] = [{"content": "1+1+0=02;#2", "source": "somebody", "quality_score": 0.5}]
    Path(source.path).parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{source.prompt: p, **row} for p in prompts]), source.path)
