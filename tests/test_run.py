"""What the composition root makes of a recipe, where that is more than passing it on."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlkd import run
from rlkd.config.load import load
from rlkd.core.errors import InfrastructureError, LearnerLost, WorkerLost
from rlkd.curriculum import Band, Difficulty, Uniform
from rlkd.fleet import started
from tests.toys import prompt_of

RECIPE = """
model: {path: models/tiny}
data: {train: {kind: arithmetic, size: 16}}
algorithm: {name: grpo}
rewards: {arithmetic: {}}
evaluate: {at_start: false, at_end: false, success: 0.8}
seed: 5
"""


@pytest.mark.parametrize(
    ("overrides", "kind", "band"),
    [
        ([], Uniform, None),
        (["curriculum.name=difficulty"], Difficulty, Band(success=0.8)),
        (
            ["curriculum={name: difficulty, low: 0.2, high: 0.8, recent: 1.0, again: 2}"],
            Difficulty,
            Band(0.2, 0.8, 0.8, 1.0, 2),
        ),
    ],
)
def test_the_recipes_curriculum(tmp_path: Path, overrides: list[str], kind: type[Any], band: Band | None) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    prompts = tuple(prompt_of(name=f"p{i}") for i in range(4))
    found = run.curriculum(load(tmp_path / "recipe.yaml", overrides), prompts, "f")
    assert type(found) is kind
    assert getattr(found, "band", None) == band
    assert sorted(found.draw().id for _ in range(4)) == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize(("losses", "more", "ends"), [(0, 0, True), (2, 2, True), (3, 2, False), (1, 0, False)])
def test_workers_lost_while_they_come_up_are_started_again(losses: int, more: int, ends: bool) -> None:
    lost: list[Exception] = [LearnerLost("learner-0 died"), WorkerLost("reward-0 died"), LearnerLost("again")][:losses]
    told: list[str] = []

    async def start() -> None:
        if lost:
            raise lost.pop(0)

    def begin() -> None:
        asyncio.run(started(start, "learner", more, lambda _, text: told.append(text)))

    if ends:
        begin()
        assert len(told) == losses
    else:
        with pytest.raises(InfrastructureError, match=f"lost {losses} times before it was up"):
            begin()
