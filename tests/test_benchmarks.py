"""The benchmarks' own code on the tiny model, in this process: one that is not run for a while must not be broken."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import head, learner, rollout, sync
from rlkd.models.get import get


@contextmanager
def here(makers: Mapping[str, Callable[[], Any]], threads: int) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """benchmarks.measure.children without processes."""
    yield {name: make() for name, make in makers.items()}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (head, learner, rollout, sync):
        monkeypatch.setattr(module, "children", here)
    monkeypatch.setattr(sync, "environment", lambda _: {})  # of this process it stays as it is
    monkeypatch.setattr(learner, "GROUPS", 1)
    monkeypatch.setattr(learner, "ANSWER", 6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


def cells(path: Path) -> list[list[str]]:
    """The rows of a result file's table."""
    rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_forms_of_the_learner_have_the_same_gradients(tiny: Path, tmp_path: Path) -> None:
    learner.main([str(tiny), "--rounds", "1", "--threads", "1", "--lengths", "tail", "--results", str(tmp_path)])
    rows = cells(tmp_path / "learner.md")
    assert [row[2] for row in rows] == [learner.FORMS[form] for form in ("padded", "packed", "rlkd")]
    assert [float(row[-1]) < 1e-5 for row in rows] == [True] * 3
    assert "TRL's head was not run" in (tmp_path / "learner.md").read_text()


def test_a_learner_that_computes_something_else_is_seen(tiny: Path, tmp_path: Path) -> None:
    """The control of the error column: the same sums over other answers."""
    for form, seed in (("padded", 0), ("rlkd", 1)):
        learner.side(form, str(tiny), None, str(tmp_path))(learner.drawn(seed, 30, "tail"))
    assert learner.error(tmp_path, "rlkd") > 0.1


def test_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SIZES", [(64, 500, 16), (300, 500, 16)])
    monkeypatch.setattr(head, "LARGEST", 64 * 500 * 4)
    head.main(["--rounds", "1", "--threads", "1", "--results", str(tmp_path)])
    assert [row[2] for row in cells(tmp_path / "head.md")] == [head.FORMS[f] for f in ("naive", "rlkd", "rlkd")]


def test_an_update_is_in_the_sampler_when_it_is_done(tiny: Path, tmp_path: Path) -> None:
    options = ["--updates", "2", "--threads", "1", "--engine", "hf", "--results", str(tmp_path)]
    sync.main([str(tiny), *options])
    found = dict(cells(tmp_path / "sync.md"))
    (gap,) = (float(value) for name, value in found.items() if name.startswith("log p"))
    assert gap < 1e-4


def test_the_sampler_of_transformers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SAMPLES", 1)
    monkeypatch.setattr(rollout, "LONGEST", 8)
    rounds = ["--rounds", "1", "--tails", "1", "--threads", "1"]
    rollout.main([str(tiny), "--without-vllm", *rounds, "--results", str(tmp_path)])
    assert [row[0] for row in cells(tmp_path / "rollout.md")] == ["uniform", "tail"]
