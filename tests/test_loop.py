"""The loop: order, staleness, exactly once, lost workers, groups turned away, failures, stop and resume."""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkd.algorithms.dapo import DAPO
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.luffy import LUFFY
from rlkd.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    InfrastructureError,
    PreflightError,
    Stopped,
)
from rlkd.core.ports import Completion, Sampling, Services
from rlkd.core.stop import StopRequest
from rlkd.core.types import Origin, Prompt
from rlkd.rollout import Demonstrated, Sampled
from rlkd.store import manifest
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.guards import Guards
from rlkd.train.health import DEFAULTS, Alarms
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
        "checkpoints": Checkpoints(Store(tmp / "checkpoints")),
        "evaluator": Evaluator([], Sampling(8)),
        "report": FakeReport(),
    }
    defaults["prompts"] = AllPrompts()
    return Loop(schedule=schedule, services=Services(policy, verify), **{**defaults, **changes})


def stopped_after(step: int, tmp: Path, **changes: Any) -> Loop:
    """A loop that ran, and was asked to stop when that step was over."""
    loop = loop_of(tmp, policy=FakePolicy(long_tailed(step)), **changes)

    class Stops(FakeReport):
        def step(self, n: int, *_: Any) -> None:
            if n == step:
                loop.stop.ask(StopRequest("signal", "SIGTERM"))

    loop.report = Stops()
    with pytest.raises(Stopped):
        asyncio.run(loop.run())
    return loop


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


def run_with_too_many_slots(loop: Loop) -> None:
    async def run() -> None:
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(0)
        while not getattr(loop, "whole", False):
            await asyncio.sleep(0)
        loop.buffer.slots = 12
        await task

    asyncio.run(run())


@pytest.mark.faults("F17")
def test_a_group_that_is_too_old_is_refused_and_nothing_saved(tmp_path: Path) -> None:
    """And the negative control of the test above: with more slots than steps × groups, groups get too old."""
    schedule = Schedule(steps=30, groups_per_step=3, staleness=0)
    loop = loop_of(tmp_path, policy=FakePolicy(long_tailed(1)), schedule=schedule)
    with pytest.raises(DivergedError, match=r"RLKD-T146.* \d steps old; schedule.staleness=0") as caught:
        run_with_too_many_slots(loop)
    assert caught.value.exit_code == 5
    assert loop.checkpoints.store.steps() == {}
    assert all(row[2]["staleness/max"] == 0 for row in loop.report.rows)  # type: ignore[attr-defined]


@pytest.mark.faults("F17")
def test_without_the_refusal_it_would_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr("rlkd.train.staleness.refuse", lambda *_: None)
    schedule = Schedule(steps=30, groups_per_step=3, staleness=0)
    loop = loop_of(tmp_path, policy=FakePolicy(long_tailed(1)), schedule=schedule)
    run_with_too_many_slots(loop)
    assert max(row[2]["staleness/max"] for row in loop.report.rows) > 0  # type: ignore[attr-defined]


@pytest.mark.faults("F17")
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_worker_that_writes_with_old_weights_is_found_by_what_its_answers_say(tmp_path: Path, staleness: int) -> None:
    """Its version stays behind from the fourth on: what it wrote is trained as long as it is young enough."""

    class Stuck(FakePolicy):
        async def generate(self, *arguments: Any, **options: Any) -> list[Completion]:
            written = await super().generate(*arguments, **options)
            return [replace(c, versions=(min(c.versions[0], 3), c.versions[1])) for c in written]

    schedule = Schedule(steps=30, groups_per_step=3, staleness=staleness)
    loop = loop_of(tmp_path, policy=Stuck(), schedule=schedule)
    with pytest.raises(DivergedError, match=rf"step {4 + staleness + 1}: .* {staleness + 1} steps old"):
        asyncio.run(loop.run())
    assert len(loop.learner.trained) == 4 + staleness  # type: ignore[attr-defined]


@pytest.mark.faults("F17")
def test_a_demonstration_has_no_age(tmp_path: Path) -> None:
    class Shown(FakePolicy):
        async def generate(self, *arguments: Any, **options: Any) -> list[Completion]:
            return [replace(c, versions=(-7, -7)) for c in await super().generate(*arguments, **options)]

    class Given(FakeVerify):
        async def __call__(self, prompt: Prompt, samples: Any) -> Any:
            judged = await super().__call__(prompt, samples)
            teacher = [np.where(s.origin == Origin.POLICY, Origin.TEACHER, s.origin).astype(np.uint8) for s in judged]
            return tuple(replace(s, origin=o) for s, o in zip(judged, teacher, strict=True))

    loop = loop_of(tmp_path, policy=Shown(), verify=Given(), algorithm=LUFFY(rollout=Demonstrated(samples=4)))
    assert asyncio.run(loop.run()) == 0
    assert all(math.isnan(row[2]["staleness/max"]) for row in loop.report.rows)  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", [GRPO(rollout=Sampled(samples=2)), DAPO(rollout=Sampled(samples=2))])
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_nothing_is_written_for_steps_after_the_last(tmp_path: Path, staleness: int, algorithm: GRPO) -> None:
    """Also not by a run that goes on shortly before its end."""
    schedule = Schedule(steps=8, groups_per_step=3, staleness=staleness)
    stopped_after(6, tmp_path, schedule=schedule, algorithm=algorithm)
    loop = loop_of(tmp_path, policy=FakePolicy(long_tailed(1)), schedule=schedule, algorithm=algorithm)
    assert asyncio.run(loop.run()) == 0
    assert not loop.buffer.ledger.pending


def test_lost_workers_cost_nothing_but_time(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, policy=FakePolicy(lose_every=5))
    asyncio.run(loop.run())
    assert sorted(all_trained(loop)) == list(range(1000, 1020))
    assert any(kind == "worker_lost" for kind, _ in loop.report.events)  # type: ignore[attr-defined]


@pytest.mark.faults("F7")
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


@pytest.mark.faults("F56")
def test_no_signal_at_all_stops_with_advice(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, algorithm=DAPO(), verify=FakeVerify(lambda _: 0.0))
    with pytest.raises(DataError, match=r"no learning signal: 4\d groups .*100% all wrong"):
        asyncio.run(loop.run())


@pytest.mark.faults("F56")
@pytest.mark.parametrize("staleness", [0, 2])
def test_steps_without_a_signal_can_be_left_out(tmp_path: Path, staleness: int) -> None:
    """The run ends after its steps, the ledger knows every prompt, and the advice is given each time."""
    schedule = Schedule(steps=4, groups_per_step=3, staleness=staleness, max_turned_away=2, on_no_signal="skip_step")
    loop = loop_of(tmp_path, algorithm=DAPO(), verify=FakeVerify(lambda _: 0.0), schedule=schedule)
    assert asyncio.run(loop.run()) == 0
    assert loop.learner.trained == []  # type: ignore[attr-defined]
    assert [step for step, _ in loop.report.ledger] == [1, 2, 3, 4]  # type: ignore[attr-defined]
    tickets = [row.ticket for _, rows in loop.report.ledger for row in rows]  # type: ignore[attr-defined]
    assert tickets == list(range(4 * 7))  # more than 2 × 3 in a row
    told = [text for kind, text in loop.report.events if kind == "no_signal"]  # type: ignore[attr-defined]
    assert len(told) == 4
    assert "100% all wrong" in told[0]
    assert "the weights stay" in told[0]
    assert [metrics["turned_away/all wrong"] for _, _, metrics in loop.report.rows] == [7.0] * 4  # type: ignore


@pytest.mark.faults("F56")
def test_a_step_is_made_of_the_few_groups_with_a_signal_whoever_was_faster(tmp_path: Path) -> None:
    def rare(sample: Any) -> float:
        return float(sample.tokens[0] % 7 == 0 and sample.tokens[3] % 2)

    taken = []
    for seed in range(3):
        schedule = Schedule(steps=5, groups_per_step=4, staleness=1, max_turned_away=2, on_no_signal="skip_step")
        algorithm = DAPO(rollout=Sampled(samples=4))
        loop = loop_of(
            tmp_path / str(seed), policy=FakePolicy(long_tailed(seed)), algorithm=algorithm,
            verify=FakeVerify(rare), schedule=schedule,
        )  # fmt: skip
        assert asyncio.run(loop.run()) == 0
        rows = [[(row.ticket, row.what) for row in rows] for _, rows in loop.report.ledger]  # type: ignore
        taken.append(rows)
        assert all(0 < sum(what == "trained" for _, what in step) < 4 for step in rows)
        assert max(metrics["staleness/max"] for _, _, metrics in loop.report.rows) == 1  # type: ignore[attr-defined]
        assert len(loop.learner.trained) == 5  # type: ignore[attr-defined]
    assert taken[0] == taken[1] == taken[2]


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
    for attempt in range(400):
        policy = FakePolicy(long_tailed(attempt))
        loop = loop_of(tmp_path, policy=policy, schedule=schedule)

        async def run(loop: Loop = loop, after: float = 0.004 + 0.0007 * attempt) -> int:
            asyncio.get_running_loop().call_later(after, loop.stop.ask, StopRequest("signal", "SIGTERM"))
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


def change_driver(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """As if it had been saved like this: the manifest fits the changed file."""
    saved = json.loads((checkpoint / "driver.json").read_text())
    change(saved)
    (checkpoint / "driver.json").write_text(json.dumps(saved))
    facts = manifest.read(checkpoint).facts
    (checkpoint / manifest.MANIFEST).unlink()
    manifest.save(checkpoint, manifest.written(checkpoint, saved["step"], {**facts, "digests": {}}))


@pytest.mark.faults("F9")
def test_forgetting_what_is_owed_would_be_caught(tmp_path: Path) -> None:
    """Negative control of the test above: drop what is pending from the checkpoint, and prompts are skipped."""
    schedule = Schedule(steps=4, groups_per_step=3, staleness=1)
    stopped_after(2, tmp_path, schedule=schedule)

    def forget(saved: dict[str, Any]) -> None:
        ledger = saved["ledger"]
        assert ledger["pending"], "with staleness 1 groups are under way at every step"
        done = len(ledger["pending"])
        saved["ledger"] |= {"pending": [], "frontier": ledger["next_ticket"], "beyond": []}
        saved["ledger"]["counts"]["trained"] += done

    change_driver(tmp_path / "checkpoints" / "step-000002", forget)
    second = loop_of(tmp_path, schedule=schedule)
    asyncio.run(second.run())
    assert sorted(all_trained(second)) != list(range(1000, 1012))


def nothing_forgotten(saved: dict[str, Any]) -> None:
    """The checkpoint as it is."""


def without_seeds(saved: dict[str, Any]) -> None:
    saved["ledger"]["pending"] = [[ticket, prompt, 0] for ticket, prompt, _ in saved["ledger"]["pending"]]


def without_curriculum(saved: dict[str, Any]) -> None:
    saved["curriculum"] = {"cursor": 0}


def without_owed(saved: dict[str, Any]) -> None:
    ledger, owed = saved["ledger"], len(saved["ledger"]["pending"])
    ledger |= {"pending": [], "frontier": ledger["next_ticket"], "beyond": []}
    ledger["counts"]["trained"] += owed


@pytest.mark.faults("F9")
@pytest.mark.parametrize("forget", [nothing_forgotten, without_seeds, without_curriculum, without_owed])
def test_an_interrupted_run_writes_the_same_tokens_unless_something_random_is_not_restored(
    tmp_path: Path, forget: Callable[[dict[str, Any]], None]
) -> None:
    """Level L4 as far as the driver goes, with its negative controls. All that is random in a run's driver is the seeds
    of owed prompts and where the curriculum stands: later seeds are a function of that."""

    def written(loop: Loop) -> dict[int, list[list[int]]]:
        rows = loop.report.rows  # type: ignore[attr-defined]
        return {step: [s.tokens.tolist() for g in groups for s in g.samples] for step, groups, _ in rows}

    schedule = Schedule(steps=5, groups_per_step=3, staleness=1)
    quiet = loop_of(tmp_path / "quiet", schedule=schedule)
    asyncio.run(quiet.run())
    stopped_after(2, tmp_path / "cut", schedule=schedule)
    change_driver(tmp_path / "cut" / "checkpoints" / "step-000002", forget)
    second = loop_of(tmp_path / "cut", schedule=schedule)
    asyncio.run(second.run())
    expected = {step: tokens for step, tokens in written(quiet).items() if step > 2}
    assert sorted(expected) == [3, 4, 5]
    assert (written(second) == expected) == (forget is nothing_forgotten)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.faults("F8")
def test_a_learner_that_dies_is_built_again_and_the_ledger_is_that_of_a_quiet_run(tmp_path: Path, seed: int) -> None:
    """Killed in every third update or so; what was done after the last checkpoint is done again, and nothing else."""
    schedule = Schedule(steps=10, groups_per_step=3, staleness=seed % 2)
    quiet = loop_of(tmp_path / "quiet", schedule=schedule)
    asyncio.run(quiet.run())
    rng = random.Random(seed)
    policy = FakePolicy(long_tailed(seed))
    learner = FakeLearner(policy, dies=lambda _: rng.random() < 0.3)
    store = Checkpoints(Store(tmp_path / "killed" / "checkpoints"), every=rng.choice([1, 2, 3]))
    loop = loop_of(tmp_path, policy=policy, learner=learner, checkpoints=store, schedule=schedule, max_restarts=100)
    assert asyncio.run(loop.run()) == 0
    assert learner.rebuilt
    assert learner.trained == quiet.learner.trained  # type: ignore[attr-defined]
    assert loop.buffer.ledger.chain == quiet.buffer.ledger.chain
    assert loop.buffer.ledger.counts == {"trained": 30}


@pytest.mark.faults("F58")
def test_the_alarms_know_the_steps_before_an_interruption_and_before_a_rollback(tmp_path: Path) -> None:
    def watched(folder: str, steps: int, past: FakeReport, dies: int = 0) -> Loop:
        def rows() -> list[dict[str, Any]]:
            return [{"step": step, **metrics} for step, _, metrics in past.rows]

        policy = FakePolicy()
        saves = Checkpoints(Store(tmp_path / folder), every=3)
        loop = loop_of(
            tmp_path, policy=policy, learner=FakeLearner(policy, dies=lambda n: n == dies), checkpoints=saves,
            schedule=Schedule(steps=steps, groups_per_step=2), guards=Guards(Alarms(DEFAULTS["float32"], past=rows)),
        )  # fmt: skip
        assert asyncio.run(loop.run()) == 0
        return loop

    def history(loop: Loop) -> str:
        assert loop.guards.alarms is not None
        return repr(loop.guards.alarms.history)

    quiet, first = watched("quiet", 12, FakeReport()), watched("twice", 7, FakeReport())
    again = watched("twice", 12, first.report, dies=2)  # type: ignore[arg-type]
    assert again.learner.rebuilt == 1  # type: ignore[attr-defined]
    assert history(again) == history(quiet)
    assert [row[0] for row in again.report.rows] == [8, 8, 9, 10, 11, 12]  # type: ignore[attr-defined]


@pytest.mark.faults("F8")
def test_a_learner_that_dies_without_end_ends_the_run(tmp_path: Path) -> None:
    policy = FakePolicy()
    loop = loop_of(tmp_path, policy=policy, learner=FakeLearner(policy, dies=lambda _: True))
    with pytest.raises(InfrastructureError, match="lost 4 times without a new checkpoint"):
        asyncio.run(loop.run())
    assert loop.learner.rebuilt == 3  # type: ignore[attr-defined]


@pytest.mark.faults("F9")
def test_going_on_with_the_old_ledger_after_a_rollback_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: if the ledger does not go back with the weights, other prompts are trained."""
    policy = FakePolicy()
    learner = FakeLearner(policy, dies=lambda n: n == 5)
    loop = loop_of(tmp_path, policy=policy, learner=learner, checkpoints=Checkpoints(Store(tmp_path / "c"), every=3))
    restore = Checkpoints.restore

    async def forgetful(self: Checkpoints, *arguments: Any) -> Any:
        before = getattr(loop, "buffer", None)
        state = await restore(self, *arguments)
        return state if before is None else replace(state, ledger=before.ledger)

    monkeypatch.setattr(Checkpoints, "restore", forgetful)
    asyncio.run(loop.run())
    assert all_trained(loop) != list(range(1000, 1020))


@pytest.mark.faults("F22")
def test_a_save_that_fails_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    policy = FakePolicy()
    checkpoints = Checkpoints(Store(tmp_path / "checkpoints"), every=1)
    loop = loop_of(tmp_path, policy=policy, learner=FakeLearner(policy, cannot_save=1), checkpoints=checkpoints)
    assert asyncio.run(loop.run()) == 0
    assert [kind for kind, _ in loop.report.events].count("save_failed") == 1  # type: ignore[attr-defined]
    assert sorted(checkpoints.store.steps()) == [4, 5]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.faults("F22")
def test_saves_that_fail_again_and_again_end_the_run(tmp_path: Path) -> None:
    policy = FakePolicy()
    checkpoints = Checkpoints(Store(tmp_path / "checkpoints"), every=1)
    loop = loop_of(tmp_path, policy=policy, learner=FakeLearner(policy, cannot_save=99), checkpoints=checkpoints)
    with pytest.raises(PreflightError, match="2 saves in a row failed"):
        asyncio.run(loop.run())


@pytest.mark.faults("F24")
def test_a_checkpoint_that_loads_as_something_else_is_refused(tmp_path: Path) -> None:
    """Level L1: what the learner has after loading is compared with what it had when it saved."""
    asyncio.run(loop_of(tmp_path, schedule=Schedule(steps=2, groups_per_step=2)).run())
    loop = loop_of(tmp_path)
    load = loop.learner.load

    async def other(path: str) -> Any:
        return {**await load(path), "rank-0/weights": "something else"}

    loop.learner.load = other  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="rank-0/weights"):
        asyncio.run(loop.run())


@pytest.mark.faults("F11")
def test_a_deadline_that_is_too_near_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    policy = FakePolicy()
    learner = FakeLearner(policy, seconds=0.02)
    checkpoints = Checkpoints(Store(tmp_path / "checkpoints"), every=2)
    loop = loop_of(tmp_path, policy=policy, learner=learner, checkpoints=checkpoints,
                   schedule=Schedule(steps=1000, groups_per_step=2))  # fmt: skip

    async def run() -> int:
        task = asyncio.create_task(loop.run())
        while getattr(loop, "step", 0) < 5:
            await asyncio.sleep(0.001)
        loop.stop.ask(StopRequest("drain", "the node is reclaimed", time.monotonic() + 1.0))
        return await task

    with pytest.raises(Stopped, match=r"no time to save within 1 s; the checkpoint of step \d+ stands"):
        asyncio.run(run())
    assert max(checkpoints.store.steps()) % 2 == 0


@pytest.mark.faults("F49")
def test_new_data_begins_a_fresh_segment(tmp_path: Path) -> None:
    """What was owed of the old data is given up, and said so; tickets go on, the new prompts begin at their first."""
    stopped_after(2, tmp_path, schedule=Schedule(steps=4, groups_per_step=3, staleness=1))
    driver = json.loads((tmp_path / "checkpoints" / "step-000002" / "driver.json").read_text())
    owed = len(driver["ledger"]["pending"])
    assert owed
    checkpoints = Checkpoints(Store(tmp_path / "checkpoints"), accept=lambda _: True)
    new = loop_of(tmp_path, schedule=Schedule(steps=4, groups_per_step=3), checkpoints=checkpoints,
                  curriculum=FakeCurriculum(cursor=500), prompts={})  # fmt: skip
    asyncio.run(new.run())
    ledger = new.buffer.ledger
    assert all_trained(new) == [*range(1000, 1006), *range(1500, 1506)]
    assert ledger.counts == {"trained": 12, "the data was changed": owed}
    assert ledger.problems() == []


def test_without_the_word_for_it_other_data_is_refused(tmp_path: Path) -> None:
    """Negative control of the test above: what is owed cannot be asked again."""
    stopped_after(2, tmp_path, schedule=Schedule(steps=4, groups_per_step=3, staleness=1))
    with pytest.raises(CheckpointError, match="ledger"):
        asyncio.run(loop_of(tmp_path, schedule=Schedule(steps=4, groups_per_step=3), prompts={}).run())


@pytest.mark.faults("F22")
def test_the_last_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run never ends well without its last step on the disk."""
    monkeypatch.setattr("rlkd.train.saving.AGAIN_S", 0.0)
    policy = FakePolicy()
    loop = loop_of(tmp_path, policy=policy, learner=FakeLearner(policy, cannot_save=1))
    assert asyncio.run(loop.run()) == 0
    assert sorted(loop.checkpoints.store.steps()) == [5]
    hopeless = loop_of(tmp_path / "2", policy=policy, learner=FakeLearner(policy, cannot_save=9),
                       checkpoints=Checkpoints(Store(tmp_path / "2")))  # fmt: skip
    with pytest.raises(PreflightError, match="2 saves in a row failed"):
        asyncio.run(hopeless.run())


@pytest.mark.faults("F11")
def test_a_save_that_just_fits_before_the_deadline_is_made(tmp_path: Path) -> None:
    policy = FakePolicy()
    learner = FakeLearner(policy, seconds=0.01)
    loop = loop_of(tmp_path, policy=policy, learner=learner, margin_s=0.2,
                   schedule=Schedule(steps=1000, groups_per_step=2))  # fmt: skip
    loop.checkpoints.save_s = 10.0
    save = learner.save

    async def slow(path: str) -> Any:
        await asyncio.sleep(0.5)
        return await save(path)

    learner.save = slow  # type: ignore[method-assign]

    async def run() -> int:
        task = asyncio.create_task(loop.run())
        while getattr(loop, "step", 0) < 3:
            await asyncio.sleep(0.001)
        loop.stop.ask(StopRequest("signal", "SIGTERM", time.monotonic() + 11.2))
        return await task

    with pytest.raises(Stopped, match="saved step"):
        asyncio.run(run())


@pytest.mark.faults("F11")
def test_a_stop_does_not_wait_for_samplers_that_take_no_weights(tmp_path: Path) -> None:
    policy = FakePolicy()
    learner = FakeLearner(policy)
    publish = learner.publish

    async def hanging(version: int) -> None:
        if version == 3:
            await asyncio.sleep(60)
        await publish(version)

    learner.publish = hanging  # type: ignore[method-assign]
    loop = loop_of(tmp_path, policy=policy, learner=learner)

    async def run() -> int:
        task = asyncio.create_task(loop.run())
        while getattr(loop, "step", 0) < 3:
            await asyncio.sleep(0.001)
        loop.stop.ask(StopRequest("signal", "SIGTERM"))
        return await asyncio.wait_for(task, 20)

    with pytest.raises(Stopped, match="saved step 3 of 5"):
        asyncio.run(run())
    assert [row[0] for row in loop.report.rows] == [1, 2, 3]  # type: ignore[attr-defined]  # the next attempt begins at 4


@pytest.mark.faults("F8")
def test_a_stop_is_heard_while_the_learner_is_built_again(tmp_path: Path) -> None:
    policy = FakePolicy()
    learner = FakeLearner(policy, dies=lambda n: n == 3)
    loop = loop_of(tmp_path, policy=policy, learner=learner, checkpoints=Checkpoints(Store(tmp_path / "c"), every=1))

    async def for_ever() -> None:
        loop.stop.ask(StopRequest("signal", "SIGTERM"))
        await asyncio.sleep(60)

    learner.rebuild = for_ever  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="the checkpoint of step 2 stands"):
        asyncio.run(asyncio.wait_for(loop.run(), 20))


def test_a_step_that_is_half_true_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error between the optimizer and the ledger: new weights with the old ledger would train prompts twice."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug in a curriculum")

    monkeypatch.setattr(FakeCurriculum, "observe", broken)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(loop_of(tmp_path).run())
    assert not Store(tmp_path / "checkpoints").steps()


def test_a_credit_step_that_loses_groups_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPO, "credit_step", lambda _, groups: groups[1:])
    with pytest.raises(ConfigError, match="credit_step gave back 3 groups for 4"):
        asyncio.run(loop_of(tmp_path).run())


@pytest.mark.faults("F24")
def test_checkpoints_that_vanished_are_no_fresh_start(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, checkpoints=Checkpoints(Store(tmp_path / "checkpoints"), promised=50))
    with pytest.raises(CheckpointError, match="saved step 50, and there is no checkpoint any more"):
        asyncio.run(loop.run())


def test_what_a_step_resolves_does_not_depend_on_who_was_faster(tmp_path: Path) -> None:
    """Groups are turned away at random places and times; every run has the same ledger."""
    chains = set()
    for seed in range(8):
        policy = FakePolicy(long_tailed(seed))
        loop = loop_of(tmp_path / str(seed), policy=policy, algorithm=DAPO(rollout=Sampled(samples=2)))
        asyncio.run(loop.run())
        chains.add(loop.buffer.ledger.chain)
        assert loop.buffer.ledger.problems() == []
        assert sum(loop.buffer.ledger.counts.values()) > 20
    assert len(chains) == 1


@pytest.mark.parametrize("error", [DataError, InfrastructureError, ZeroDivisionError])
def test_whatever_ends_the_run_the_last_whole_step_is_saved(tmp_path: Path, error: type[Exception]) -> None:
    calls = []

    def broken(sample: Any) -> float:
        calls.append(sample)
        if len(calls) > 40:
            raise error("RLKD-X", "no") if error is not ZeroDivisionError else error("no")
        return float(len(calls) % 2)

    with pytest.raises(error):
        asyncio.run(loop_of(tmp_path, verify=FakeVerify(broken)).run())
    assert sorted(Store(tmp_path / "checkpoints").steps()) == [2]


@pytest.mark.faults("F54")
def test_but_not_when_its_numbers_are_in_doubt(tmp_path: Path) -> None:
    """Negative control of the test above."""
    calls = []

    def diverged(sample: Any) -> float:
        calls.append(sample)
        if len(calls) > 40:
            raise DivergedError("RLKD-X", "nan")
        return float(len(calls) % 2)

    with pytest.raises(DivergedError):
        asyncio.run(loop_of(tmp_path, verify=FakeVerify(diverged)).run())
    assert not Store(tmp_path / "checkpoints").steps()


def test_an_unreadable_checkpoint_is_refused(tmp_path: Path) -> None:
    asyncio.run(loop_of(tmp_path, schedule=Schedule(steps=2, groups_per_step=2)).run())
    change_driver(tmp_path / "checkpoints" / "step-000002", lambda saved: saved.pop("ledger"))
    with pytest.raises(CheckpointError, match=r"driver\.json"):
        asyncio.run(loop_of(tmp_path).run())


def test_old_checkpoints_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path / "checkpoints"), every=1)
    asyncio.run(loop_of(tmp_path, checkpoints=checkpoints).run())
    assert sorted(checkpoints.store.steps()) == [4, 5]


def test_going_back_renames_what_comes_after_only_when_the_remote_store_has_withdrawn_it(tmp_path: Path) -> None:
    store, order = Store(tmp_path / "checkpoints"), list[str]()
    asyncio.run(loop_of(tmp_path, checkpoints=Checkpoints(store, every=1)).run())

    def withdraw(step: int) -> list[int]:
        order.append(f"there, after {step}")
        raise CheckpointError("RLKD-K014", "no access", where="s3")

    def aside(step: int) -> list[int]:
        order.append(f"here, after {step}")
        return [5]

    broken = Store(tmp_path / "checkpoints")
    broken.withdraw_after = withdraw  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="no access"):
        asyncio.run(loop_of(tmp_path, checkpoints=Checkpoints(broken, aside=aside), resume=4).run())
    assert order == ["there, after 4"]
    assert store.there() == [4, 5]


def test_without_a_number_of_steps_the_time_between_saves_follows_what_a_save_takes(tmp_path: Path) -> None:
    now = [0.0]
    checkpoints = Checkpoints(Store(tmp_path), every=None, between_failures_s=8.0, clock=lambda: now[0])
    checkpoints.save_s = 4.0
    assert checkpoints.interval_s == pytest.approx(8.0)  # √(2·4·8)
    now[0] = 7.9
    assert not checkpoints.due(3, 10)
    now[0] = 8.0
    assert checkpoints.due(3, 10)
    assert checkpoints.due(10, 10)


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
    assert any("rollout p0" in text for text in waits)


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
