"""What the numbers of a run say: mismatch, alarms, advice, the canary. All on made-up steps."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlkd.core.errors import DIVERGED, DivergedError
from rlkd.core.types import Finish, Group, Origin, Prompt, Sample
from rlkd.report.files import as_json
from rlkd.train.canary import Canary, compare
from rlkd.train.health import (
    DEFAULTS,
    EVERY,
    Alarms,
    Bounds,
    Facts,
    Limits,
    alarms,
    bounds,
    facts_of,
    mismatch_alarm,
    repetition,
)
from rlkd.train.no_signal import PassRates

WELL = Facts(1, length=50.0, truncated=0.0, repetition=0.02, entropy=1.0, reward=0.5, spread={"a": 0.4, "b": 0.4})
FP32 = DEFAULTS["float32"]


def steps(n: int, **last: Any) -> list[Facts]:
    """`n` healthy steps, the last five of them with something else."""
    return [replace(WELL, step=i, **(last if i > n - 5 else {})) for i in range(1, n + 1)]


def kinds(history: list[Facts], limits: Limits | None = None) -> list[str]:
    return [a.kind for a in alarms(history, limits or Limits())]


def group(rewards: list[float], source: str = "s", finish: Finish = Finish.STOP, **scores: list[float]) -> Group:
    prompt = Prompt("p", np.array([1, 2], np.int32), "x", source=source)
    samples = []
    for i, reward in enumerate(rewards):
        tokens = np.array([1, 2, 10, 11, 12, 13, 14 + i], np.int32)
        origin = np.array([Origin.PROMPT] * 2 + [Origin.POLICY] * 5, np.uint8)
        own = {name: values[i] for name, values in scores.items()}
        samples.append(Sample(tokens, origin, np.zeros(7, np.float32), (0, 0), finish, reward, own))
    return Group(prompt, tuple(samples))


# --- mismatch


@pytest.mark.faults("F57")
def test_mismatch_warns_then_ends_the_run() -> None:
    assert mismatch_alarm(replace(WELL, mismatch=1e-5, mismatch_max=1e-3), FP32) is None
    warned = mismatch_alarm(replace(WELL, mismatch=0.01, mismatch_max=0.05), FP32)
    assert warned is not None
    assert (
        "sampler and learner differ by 0.01 nats on average (largest 0.05); health.mismatch_warn=0.001" in warned.text
    )
    with pytest.raises(DivergedError, match="RLKD-T143") as caught:
        mismatch_alarm(replace(WELL, mismatch=0.2, mismatch_max=0.3), FP32)
    assert caught.value.exit_code == DIVERGED


@pytest.mark.faults("F57")
@pytest.mark.parametrize(("largest", "outcome"), [(0.01, None), (0.5, "warn"), (math.inf, "stop"), (3.0, "stop")])
def test_one_token_alone_can_be_too_far(largest: float, outcome: str | None) -> None:
    facts = replace(WELL, mismatch=1e-5, mismatch_max=largest)
    if outcome == "stop":
        with pytest.raises(DivergedError):
            mismatch_alarm(facts, FP32)
    else:
        assert (mismatch_alarm(facts, FP32) is not None) == (outcome == "warn")


def test_bounds_by_dtype_by_recipe_and_off() -> None:
    assert bounds("float32", None, None, None) == FP32
    assert bounds("bfloat16", None, None, None).mismatch_stop > FP32.mismatch_stop
    assert bounds("float32", 0.5, 0.0, 2.0) == Bounds(0.5, math.inf, 2.0)
    assert mismatch_alarm(replace(WELL, mismatch=9.0, mismatch_max=99.0), bounds("float32", 0.0, 0.0, 0.0)) is None
    assert mismatch_alarm(WELL, FP32) is None  # a step of demonstrations: nothing was sampled


# --- alarms


def test_a_healthy_run_is_left_alone() -> None:
    assert kinds(steps(40)) == []
    assert kinds(steps(3, truncated=1.0)) == []  # too early to say


@pytest.mark.faults("F58", "F46")
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("truncated", {"truncated": 0.25}),
        ("repetition", {"repetition": 0.5}),
        ("length", {"length": 120.0}),
        ("entropy", {"entropy": 0.05}),
        ("one_part", {"spread": {"a": 0.4, "b": 0.0}}),
        ("no_signal", {"nothing": 1.0}),
    ],
)
def test_each_alarm_and_no_other(kind: str, what: Mapping[str, Any]) -> None:
    assert kinds(steps(40, **what)) == [kind]
    setting = {"length": "length_growth", "entropy": "entropy_share"}.get(kind, kind)
    if kind not in ("one_part", "no_signal"):
        assert kinds(steps(40, **what), Limits(**{setting: 0.0})) == []


def test_unknown_numbers_raise_nothing() -> None:
    nan = math.nan
    unknown = Facts(1, nan, nan, nan, nan, nan, {})
    assert kinds([replace(unknown, step=i) for i in range(1, 30)]) == []
    assert kinds(steps(40, spread={"a": 0.0, "b": 0.0})) == []  # no part differs: that is no signal, not one part


def test_repetition() -> None:
    assert repetition(np.arange(20, dtype=np.int32)) == 0.0
    assert repetition(np.zeros(3, np.int32)) == 0.0
    assert repetition(np.zeros(104, np.int32)) == pytest.approx(1 - 1 / 101)
    assert repetition(np.tile(np.arange(4, dtype=np.int32), 5)) == pytest.approx(1 - 4 / 17)


def test_facts_of_groups() -> None:
    groups = [group([1.0, 0.0], right=[1.0, 0.0], format=[1.0, 1.0]), group([1.0, math.nan], finish=Finish.LENGTH)]
    facts = facts_of(7, groups, {"entropy": 0.3, "mismatch/mean": 1e-6, "mismatch/max": 1e-4})
    assert (facts.step, facts.length, facts.truncated, facts.entropy) == (7, 5.0, 0.5, 0.3)
    assert facts.reward == pytest.approx(2 / 3)
    assert facts.spread == {"right": 0.5, "format": 0.0}
    assert (facts.mismatch, facts.mismatch_max) == (1e-6, 1e-4)


@pytest.mark.faults("F58")
def test_at_most_one_of_a_kind_in_so_many_steps_and_a_rewound_run_begins_again_there() -> None:
    cut = [group([1.0, 0.0], finish=Finish.LENGTH)]
    run = Alarms(FP32)
    told = [s for s in range(1, 61) if any(a.kind == "truncated" for a in run.step(s, cut, {}))]
    assert told == [5, 5 + EVERY, 5 + 2 * EVERY]
    run.step(30, cut, {})
    assert [f.step for f in run.history] == list(range(1, 31))
    assert [s for s in range(31, 60) if run.step(s, cut, {})] == [50]  # 30 was told again: it was done again


def growing(run: Alarms, steps: Sequence[int]) -> list[str]:
    """What is told of these steps, and their rows; from the 12th on answers are longer, a part of the reward dead."""
    found = []
    for step in steps:
        one = group([1.0, 0.0], a=[1.0, 0.0], b=[0.0, 0.0] if step > 11 else [0.1, 0.4])
        if step > 11:
            one = replace(one, samples=tuple(longer(s) for s in one.samples))
        found += [a.kind for a in run.step(step, [one], {"entropy": 0.5})]
        found += [f"row {as_json({'step': step, 'entropy': 0.5, **run.row()})}"]
    return found


def longer(sample: Sample) -> Sample:
    more = np.arange(100, 110, dtype=np.int32)
    return replace(
        sample,
        tokens=np.concatenate([sample.tokens, more]),
        origin=np.concatenate([sample.origin, np.full(10, Origin.POLICY, np.uint8)]),
        behavior_logp=np.concatenate([sample.behavior_logp, np.zeros(10, np.float32)]),
    )


def told_and_rows(found: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    rows = [json.loads(text.removeprefix("row ")) for text in found if text.startswith("row ")]
    return [text for text in found if not text.startswith("row ")], rows


@pytest.mark.faults("F58")
@pytest.mark.parametrize("resumed", [12, 14])
def test_a_resumed_run_is_compared_with_its_first_steps_and_not_with_those_after_the_resume(resumed: int) -> None:
    """What was trained past the checkpoint is in the rows, too, and is not looked at."""
    quiet, before = Alarms(FP32), Alarms(FP32)
    expected, _ = told_and_rows(growing(quiet, range(1, 19)))
    assert sorted(set(expected)) == ["length", "one_part"]
    _, rows = told_and_rows(growing(before, range(1, 15)))
    again = Alarms(FP32, past=lambda: rows)
    again.begin(resumed)
    assert [f.step for f in again.history] == list(range(1, resumed + 1))
    assert told_and_rows(growing(again, range(resumed + 1, 19)))[0] == expected
    assert repr(again.history) == repr(quiet.history)
    forgetful = Alarms(FP32)  # negative control: this is what every resume was like
    assert told_and_rows(growing(forgetful, range(resumed + 1, 40)))[0] == []


def test_rows_of_an_older_rlkd_say_nothing() -> None:
    old = Alarms(FP32, past=lambda: [{"step": s, "reward/mean": 0.5, "entropy": None} for s in range(1, 12)])
    old.begin(11)
    assert all(math.isnan(f.length) and math.isnan(f.entropy) and not f.spread for f in old.history)
    assert told_and_rows(growing(old, range(12, 30)))[0] == []


def test_a_step_that_diverges_is_an_error_of_the_one_call() -> None:
    with pytest.raises(DivergedError, match="step 3: sampler and learner differ by 5 nats"):
        Alarms(FP32).step(3, [group([1.0])], {"mismatch/mean": 5.0, "mismatch/max": 9.0})


# --- no signal


@pytest.mark.faults("F56")
def test_advice_names_the_sources_hardest_first() -> None:
    rates = PassRates()
    for _ in range(3):
        rates.add(group([0.0, 0.0], "math-l5"))
        rates.add(group([1.0, 1.0], "arithmetic"))
    rates.add(group([1.0, 0.0], "math-l5"))
    table = rates.advice().splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["math-l5", "arithmetic"]
    assert table[1].split()[1:] == ["4", "12%", "0%", "75%"]
    assert table[2].split()[1:] == ["3", "100%", "100%", "0%"]
    assert "algorithm.rollout.samples=4" in table[-1]
    rates.clear()
    assert "no answer could be judged" in rates.advice()


@pytest.mark.faults("F56")
@pytest.mark.parametrize(("rewards", "said"), [([0.0] * 4, "too hard"), ([1.0] * 4, "too easy")])
def test_advice_says_what_to_try(rewards: list[float], said: str) -> None:
    rates = PassRates()
    rates.add(group(rewards))
    assert rates.advice().splitlines()[-1].startswith(said)


def test_a_rows_own_level_counts_apart() -> None:
    rates = PassRates()
    one = group([1.0, 0.0], "math")
    rates.add(replace(one, prompt=replace(one.prompt, metadata={"level": 5})))
    assert "math, 5" in rates.advice()


# --- canary


TOKENS = {"tokens": [3, 4, 5], "logp": [None, -1.0, -2.0]}


def reading(*logp: float, cached: float = 0.0) -> Any:
    return SimpleNamespace(logp=np.array([math.nan, *logp], np.float32), cached=cached)


def canary(answers: list[Mapping[str, Any]], every: int = 1) -> tuple[Canary, list[int], list[str]]:
    """One whose workers answer in turn; the syncs it asks for, and what it tells."""
    syncs: list[int] = []
    told: list[str] = []
    left = iter(answers)

    async def probe() -> Mapping[str, Any]:
        return TOKENS

    async def readings(tokens: np.ndarray) -> Mapping[str, Any]:
        assert tokens.tolist() == TOKENS["tokens"]
        return next(left)

    async def resync(version: int) -> None:
        syncs.append(version)

    return Canary(every, FP32, probe, readings, resync, lambda kind, text: told.append(f"[{kind}] {text}")), syncs, told


GOOD, STALE = {"rollout-0": reading(-1.0, -2.0), "rollout-1": reading(-1.001, -2.0)}, {"rollout-0": reading(-1.5, -2.5)}


@pytest.mark.faults("F19")
def test_a_canary_that_agrees_asks_for_nothing() -> None:
    made, syncs, told = canary([GOOD, GOOD], every=2)
    assert [asyncio.run(made.check(step)) for step in (1, 2, 3)] == [None, pytest.approx(5e-4, rel=0.1), None]
    assert (syncs, told) == ([], [])


@pytest.mark.faults("F17", "F19")
def test_stale_weights_are_sent_again_once_and_then_end_the_run() -> None:
    made, syncs, told = canary([STALE, GOOD, STALE, STALE])
    assert asyncio.run(made.check(4)) == pytest.approx(5e-4, rel=0.1)
    assert syncs == [4]
    assert "rollout-0 is off by 0.5 nats from the learner" in told[0]
    with pytest.raises(DivergedError, match="RLKD-T144") as caught:
        asyncio.run(made.check(5))
    assert caught.value.exit_code == DIVERGED
    assert syncs == [4, 5]


@pytest.mark.faults("F19")
def test_a_stale_prompt_cache_shows_although_scoring_agrees() -> None:
    made, syncs, _ = canary([{"rollout-0": reading(-1.0, -2.0, cached=0.4)}, GOOD])
    asyncio.run(made.check(1))
    assert syncs == [1]


def test_no_numbers_are_worse_than_any_and_no_workers_say_nothing() -> None:
    off = compare(TOKENS["logp"], {"a": reading(-1.0, -9.0), "b": reading(math.nan, -2.0), "c": reading(-1.0, -2.0)})
    assert [o.worker for o in off] == ["b", "a", "c"]
    assert off[0].worst == math.inf
    assert compare(TOKENS["logp"], {"a": reading(-1.0, -2.0, cached=math.nan)})[0].worst == 0.0
    made, _, _ = canary([{}])
    assert asyncio.run(made.check(1)) is None
    off_for_good, _, _ = canary([], every=0)
    assert asyncio.run(off_for_good.check(1)) is None
