"""A teacher's budget that is reached: the run saves its last whole step, ends with exit 6, and can go on."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlkd.algorithms.grpo import GRPO
from rlkd.core.errors import BudgetReached, DivergedError, RlkdError
from rlkd.core.ports import Knobs, Sampling, Services
from rlkd.core.types import Group
from rlkd.guidance import NoGuidance
from rlkd.rollout import Sampled
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop, Schedule
from tests.fakes import AllPrompts, FakeCurriculum, FakeLearner, FakePolicy, FakeReport, FakeVerify


@dataclass(frozen=True)
class Costly(NoGuidance):
    """Guidance by somebody who answers `calls` groups."""

    calls: int = 10
    error: type[RlkdError] = BudgetReached
    counted: list[str] | None = None

    async def __call__(self, group: Group, ask: Services, knobs: Knobs) -> Group:
        assert self.counted is not None
        if len(self.counted) >= self.calls:
            raise self.error("RLKD-I720", "the budget of teachers.big is reached")
        self.counted.append(group.prompt.id)
        return group


def loop_of(tmp: Path, guidance: Costly, policy: FakePolicy) -> Loop:
    return Loop(
        Schedule(steps=5, groups_per_step=4),
        GRPO(rollout=Sampled(samples=4), guidance=guidance),
        FakeCurriculum(),
        AllPrompts(),
        Services(policy, FakeVerify()),
        FakeLearner(policy),
        Checkpoints(Store(tmp / "checkpoints")),
        Evaluator([], Sampling(8)),
        FakeReport(),
    )


def test_the_last_whole_step_is_saved_and_the_run_can_go_on(tmp_path: Path) -> None:
    policy = FakePolicy()
    with pytest.raises(BudgetReached) as caught:
        asyncio.run(loop_of(tmp_path, Costly(calls=10, counted=[]), policy).run())
    assert caught.value.exit_code == 6  # not 75: the same command alone would end the same way
    (saved,) = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert saved.name == "step-000002"
    assert len(json.loads((saved / "driver.json").read_text())["ledger"]["pending"]) == 4
    again = loop_of(tmp_path, Costly(calls=99, counted=[]), policy)
    assert asyncio.run(again.run()) == 0
    trained = [p for step in again.learner.trained for p in step]  # type: ignore[attr-defined]
    assert sorted(trained) == list(range(1000, 1020))  # each prompt once, over both attempts


def test_a_run_whose_numbers_are_in_doubt_saves_nothing(tmp_path: Path) -> None:
    """Negative control."""
    guidance = Costly(calls=10, counted=[], error=DivergedError)
    with pytest.raises(DivergedError):
        asyncio.run(loop_of(tmp_path, guidance, FakePolicy()).run())
    assert not (tmp_path / "checkpoints").exists()
