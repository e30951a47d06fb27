"""The loop: order, staleness, exactly once, lost workers, groups turned away, failures, stop and resume."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkd.algorithms.dapo import DAPO
from rlkd.algorithms.grpo import GRPO
from rlkd.core.errors import CheckpointError, DataError, InfrastructureError, Stopped
from rlkd.core.ports import Sampling, Services
from rlkd.rollout import Sampled
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop, Schedule
from tests.fakes import (
    AllPrompts,
    FakeCurriculum,
    FakeLearner,
    FakePolicy,
    FakeReport,
    FakeVerify,
    long_tailed,
    numbered,
)


def loop_of(tmp: Path, **changes: Any) -> Loop:
    policy = changes.pop("policy", FakePolicy())
    verify = changes.pop("verify", FakeVerify())
    schedule = changes.pop("schedule", Schedule(steps=5, groups_per_step=4))
    defaults: dict[str, Any] = {
        "algorithm": GRPO(rollout=Sampled(samples=4)),
        "curriculum": FakeCurriculum(),
        "learner": FakeLearner(policy),
        "checkpoints": Checkpoints(tmp / "checkpoints"),
        "evaluator": Evaluator([], Sampling(8)),
        "report": FakeReport(),
    }
    return Loop(schedule=schedule, prompts=AllPrompts(), services=Services(policy, verify), **{**defaults, **changes})


def all_trained(loop: Loop) -> list[int]:
    return [p for step in loop.learner.trained for p in step]  # type: ignore[attr-defined]


def test_synchronous_run_trains_every_prompt_once_and_in_order(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, policy=FakePolicy(long_tailed(0)))
    assert asyncio.run(loop.run()) == 0
    assert loop.learner.trained == [[1000 + 4 * s + i for i in range(4)] for s in range(5)]  # type: ignore[attr-defined]
    assert [row[0] for row in loop.report.rows] == [1, 2, 3, 4, 5]  # type: ignore[attr-defined]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_staleness_bound_is_kept_and_reached(tmp_path: Path, staleness: int) -> None:
    schedule = Schedule(steps=30, groups_per_step=3, staleness=staleness)
    loop = loop_of(tmp_path, policy=FakePolicy(long_tailed(1)), schedule=schedule)
    asyncio.run(loop.run())
    ages = [row[2]["staleness/max"] for row in loop.report.rows]  # type: ignore[attr-defined]
    assert max(ages) == staleness
    assert sorted(all_trained(loop)) == list(range(1000, 1000 + 90))


def test_without_holding_slots_the_bound_breaks(tmp_path: Path) -> None:
    """Negative control: give slots back before the new weights are in the samplers, and groups get too old."""
    schedule = Schedule(steps=30, groups_per_step=3, staleness=0)
    loop = loop_of(tmp_path, policy=FakePolicy(long_tailed(1)), schedule=schedule)

    async def run() -> None:
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(0)
        while not hasattr(loop, "buffer"):
            await asyncio.sleep(0)
        loop.buffer.slots = 12
        await task

    asyncio.run(run())
    assert max(row[2]["staleness/max"] for row in loop.report.rows) > 0  # type: ignore[attr-defined]


def test_lost_workers_cost_nothing_but_time(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, policy=FakePolicy(lose_every=5))
    asyncio.run(loop.run())
    assert sorted(all_trained(loop)) == list(range(1000, 1020))
    assert any(kind == "worker_lost" for kind, _ in loop.report.events)  # type: ignore[attr-defined]


def test_a_prompt_that_always_loses_its_worker_ends_the_run(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, policy=FakePolicy(lose_every=1))
    with pytest.raises(InfrastructureError, match="lost its worker 4 times"):
        asyncio.run(loop.run())


def test_groups_turned_away_are_replaced_and_counted(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, algorithm=DAPO(rollout=Sampled(samples=2)))
    asyncio.run(loop.run())
    rows = loop.report.rows  # type: ignore[attr-defined]
    assert all(len({s.reward for s in g.samples}) == 2 for _, groups, _ in rows for g in groups)
    away = sum(v for _, _, m in rows for k, v in m.items() if k.startswith("turned_away/"))
    assert away > 0
    assert loop.report.observed >= 20 + away  # type: ignore[attr-defined]


def test_no_signal_at_all_stops_with_advice(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, algorithm=DAPO(), verify=FakeVerify(lambda _: 0.0))
    with pytest.raises(DataError, match=r"no learning signal: 4\d groups .*100% all wrong"):
        asyncio.run(loop.run())


def test_unjudged_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    verify = FakeVerify(lambda s: math.nan if s.tokens[3] % 3 == 0 else float(s.tokens[3] % 2))
    loop = loop_of(tmp_path, verify=verify)
    asyncio.run(loop.run())
    rows = loop.report.rows  # type: ignore[attr-defined]
    assert not any(math.isnan(s.reward) for _, groups, _ in rows for g in groups for s in g.samples)
    assert any(kind == "unjudged" for kind, _ in loop.report.events)  # type: ignore[attr-defined]


def test_one_failing_coroutine_ends_the_run_with_its_error(tmp_path: Path) -> None:
    def broken(_: Any) -> float:
        raise ZeroDivisionError("bug in a verifier")

    with pytest.raises(ZeroDivisionError, match="bug in a verifier"):
        asyncio.run(loop_of(tmp_path, verify=FakeVerify(broken)).run())


def test_stop_saves_and_the_same_run_continues_without_loss(tmp_path: Path) -> None:
    """Stopped again and again in the middle of anything; every prompt is trained once, none is skipped."""
    schedule = Schedule(steps=12, groups_per_step=3, staleness=1)
    codes = []
    for attempt in range(60):
        policy = FakePolicy(long_tailed(attempt))
        loop = loop_of(tmp_path, policy=policy, schedule=schedule)

        async def run(loop: Loop = loop, after: float = 0.004 + 0.0007 * attempt) -> int:
            asyncio.get_running_loop().call_later(after, loop.stop.set)
            return await loop.run()

        try:
            codes.append(asyncio.run(run()))
            break
        except Stopped as stopped:
            codes.append(stopped.exit_code)
    assert codes[-1] == 0
    assert codes[:-1] == [75] * attempt
    assert attempt > 1
    assert sorted(all_trained(loop)) == list(range(1000, 1036))
    assert len(loop.learner.trained) == 12  # type: ignore[attr-defined]


def test_forgetting_what_is_owed_would_be_caught(tmp_path: Path) -> None:
    """Negative control of the test above: drop `owed` from the checkpoint, and prompts are skipped."""
    schedule = Schedule(steps=4, groups_per_step=3, staleness=1)
    first = loop_of(tmp_path, schedule=replace(schedule, steps=2))
    asyncio.run(first.run())
    path = tmp_path / "checkpoints" / "step-000002" / "driver.json"
    saved = json.loads(path.read_text())
    assert saved["owed"], "with staleness 1 groups are under way at every step"
    path.write_text(json.dumps({**saved, "owed": []}))
    second = loop_of(tmp_path, schedule=schedule)
    asyncio.run(second.run())
    assert sorted(all_trained(second)) != list(range(1000, 1012))


def test_an_unreadable_checkpoint_is_refused(tmp_path: Path) -> None:
    asyncio.run(loop_of(tmp_path, schedule=Schedule(steps=2, groups_per_step=2)).run())
    (tmp_path / "checkpoints" / "step-000002" / "driver.json").write_text('{"step": 2')
    with pytest.raises(CheckpointError, match=r"driver\.json"):
        asyncio.run(loop_of(tmp_path).run())


def test_old_checkpoints_go_and_half_written_ones_are_ignored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=2)
    asyncio.run(loop_of(tmp_path, checkpoints=checkpoints).run())
    assert [p.name for p in checkpoints.complete()] == ["step-000004", "step-000005"]
    (tmp_path / "checkpoints" / "step-000005" / "COMPLETE").unlink()
    assert [p.name for p in checkpoints.complete()] == ["step-000004"]


def test_evaluation_uses_the_same_seeds_every_time(tmp_path: Path) -> None:
    seen: list[tuple[int, Any]] = []
    evaluator = Evaluator([numbered(i) for i in range(20)], Sampling(8), every=2, tell=lambda s, r: seen.append((s, r)))
    asyncio.run(loop_of(tmp_path, evaluator=evaluator).run())
    assert [s for s, _ in seen] == [0, 2, 4, 5]
    assert len({json.dumps(r.pass_at[1].value) for _, r in seen}) == 1  # the fake policy does not learn


def test_a_long_wait_is_told(tmp_path: Path) -> None:
    schedule = Schedule(steps=1, groups_per_step=1, stall_s=0.02)
    loop = loop_of(tmp_path, policy=FakePolicy(lambda: 0.15), schedule=schedule)
    asyncio.run(loop.run())
    waits = [text for kind, text in loop.report.events if kind == "waiting"]  # type: ignore[attr-defined]
    assert waits
    assert "rollout p0" in waits[0]


def test_an_evaluation_survives_a_lost_worker(tmp_path: Path) -> None:
    evaluator = Evaluator([numbered(i) for i in range(6)], Sampling(8))
    asyncio.run(loop_of(tmp_path, evaluator=evaluator, policy=FakePolicy(lose_every=4)).run())
    assert evaluator.results[0].prompts == 6


def test_an_error_in_one_evaluation_leaves_none_of_the_others_running(tmp_path: Path) -> None:
    """Left-over coroutines would go on using Ray after it was shut down."""

    def broken(_: Any) -> float:
        raise ZeroDivisionError("bug in a verifier")

    async def run() -> int:
        evaluator = Evaluator([numbered(i) for i in range(6)], Sampling(8))
        loop = loop_of(
            tmp_path, evaluator=evaluator, policy=FakePolicy(long_tailed(0, 0.05)), verify=FakeVerify(broken)
        )
        with pytest.raises(ZeroDivisionError):
            await loop.run()
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
