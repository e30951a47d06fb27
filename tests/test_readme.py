"""The README's worked examples work, and its commands exist."""

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rlkd import cli
from rlkd.config.load import load
from tests.toys import group_of

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)  # of commands, and what they print


def example(name: str) -> str:
    found = re.search(rf"<!-- {name} example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no {name} example"
    return found.group(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards_of_mine.py").write_text(example("reward"))
    (tmp_path / "algo_of_mine.py").write_text(example("algorithm"))
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: m}\n"
        "data: {train: {kind: arithmetic, size: 20}, holdout: {kind: arithmetic, size: 5, split: holdout}}\n"
        'algorithm: {name: "algo_of_mine:Best", keep: 0.5}\n'
        'rewards: {"rewards_of_mine.py:ends_with_stop": {}}\n'
        "schedule: {steps: 1}\n"
    )
    return tmp_path


def test_the_algorithm_of_the_readme(here: Path) -> None:
    config = load(here / "recipe.yaml")
    credited = config.algorithm.credit(group_of([0.0, 1.0, 0.5, 0.2], [2] * 4))
    assert [float(s.advantage[0]) for s in credited.samples] == [0, 1, 1, 0]
    assert isinstance(credited.samples[0].advantage, np.ndarray)


def test_the_reward_of_the_readme(here: Path) -> None:
    from rlkd.core.types import Answer, Finish
    from rlkd.engines.jail import Jail
    from rlkd.rewards.table import pack
    from tests.toys import prompt_of

    config = load(here / "recipe.yaml")
    jail = Jail(pack(config.rewards))
    try:
        jail.start()
        verdicts = jail.score(prompt_of(), [Answer("Done.", Finish.STOP, 2), Answer("not done", Finish.STOP, 2)])
    finally:
        jail.close()
    assert [list(v.scores.values()) for v in verdicts] == [[1.0], [0.0]]


def test_every_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"rlkd ([a-z]+(?:-[a-z]+)*(?: get| ls)?)", "\n".join(BLOCKS)))
    assert {"train", "check", "doctor", "eval", "export", "model get", "chaos", "resume"} <= named
    for command in named:
        done = CliRunner().invoke(cli.app, [*command.split(), "--help"])
        assert done.exit_code == 0, done.output


def test_every_path_of_the_map_exists() -> None:
    root = Path(__file__).parents[1]
    block = README.split("## The map")[1].split("```")[1]
    for path in re.findall(r"^(rlkd/[\w/.]+|configs/|benchmarks/|docs/\S+)", block, re.MULTILINE):
        assert (root / path).exists(), path


def test_every_recipe_that_is_named_exists() -> None:
    """In the README, in docs/ and in rlkd's own help and messages. METHOD and * stand for any."""
    root = Path(__file__).parents[1]
    texts = [
        root / "README.md",
        *(root / "docs").rglob("*.md"),
        *(root / "launch").glob("*.md"),
        *(root / "rlkd").rglob("*.py"),
    ]
    named = {
        (str(path.relative_to(root)), recipe)
        for path in texts
        for recipe in re.findall(r"configs/[\w./*-]+\.yaml", path.read_text(encoding="utf-8"))
    }
    assert {"README.md", "rlkd/cli.py", "docs/cluster.md"} <= {path for path, _ in named}
    for path, recipe in sorted(named):
        assert any(root.glob(re.sub(r"METHOD|NAME", "*", recipe))), f"{path}: {recipe}"
