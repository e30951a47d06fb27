"""The order of prompts: each once an epoch, the same in every process, and continued exactly after a resume."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core.errors import NO_CHECKPOINT, CheckpointError, ConfigError
from rlkd.core.ports import Curriculum
from rlkd.core.types import Origin, Prompt
from rlkd.curriculum import Band, Difficulty, Uniform
from rlkd.curriculum.order import occurrence_seed, permutation
from tests.toys import group_of, prompt_of


def prompts(n: int) -> list[Prompt]:
    return [prompt_of(name=f"p{i}") for i in range(n)]


def drawn(curriculum: Curriculum, n: int) -> list[tuple[str, int]]:
    return [(prompt.id, prompt.seed) for prompt in (curriculum.draw() for _ in range(n))]


def judged(curriculum: Curriculum, rates: Callable[[Prompt], float], n: int) -> list[str]:
    """Draw n prompts, and tell the curriculum that 4 answers to each pass at the given rate."""
    ids = []
    for _ in range(n):
        prompt = curriculum.draw()
        passed = round(4 * rates(prompt))
        curriculum.observe(group_of([1.0] * passed + [0.0] * (4 - passed), [2] * 4, prompt=prompt))
        ids.append(prompt.id)
    return ids


BOTH = pytest.mark.parametrize("kind", [Uniform, Difficulty])


@BOTH
def test_is_the_ports_curriculum(kind: type[Uniform]) -> None:
    assert isinstance(kind(prompts(2), "f", 0), Curriculum)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**63), st.text(max_size=8), st.integers(1, 4))
def test_each_epoch_has_every_prompt_once(n: int, seed: int, fingerprint: str, epochs: int) -> None:
    curriculum = Uniform(prompts(n), fingerprint, seed)
    for epoch in range(epochs):
        assert curriculum.epoch == epoch
        order = [prompt for prompt, _ in drawn(curriculum, n)]
        assert sorted(order) == sorted(p.id for p in prompts(n))
        assert order == [f"p{i}" for i in permutation(fingerprint, seed, epoch, n)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 5),
    st.sampled_from([Uniform, Difficulty]),
)
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(
    n: int, before: int, after: int, seed: int, kind: type[Uniform]
) -> None:
    def rate(prompt: Prompt) -> float:
        return int(prompt.id[1:]) % 5 / 4

    whole, first, second = (kind(prompts(n), "f", seed) for _ in range(3))
    expected = judged(whole, rate, before + after)[before:]
    judged(first, rate, before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert judged(second, rate, after) == expected
    assert drawn(second, 3) == drawn(whole, 3)  # the seeds too


def test_orders_differ_by_epoch_seed_and_data() -> None:
    orders = [permutation(f, s, e, 50).tolist() for f in ("a", "b") for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 8


ORDER = [9, 4, 8, 3, 7, 5, 1, 2, 6, 0]
SEEDS = [3667860613603575125, 7504696192334579587]


def test_the_order_and_the_seeds_never_change() -> None:
    """Fixed values: a resumed run must find them in any later version of numpy, Python and rlkd."""
    assert permutation("fingerprint", 1, 2, 10).tolist() == ORDER
    assert [occurrence_seed(1, 2, position) for position in range(2)] == SEEDS


def test_the_order_does_not_depend_on_the_process() -> None:
    code = "from rlkd.curriculum.order import permutation; print(permutation('fingerprint', 1, 2, 10).tolist())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}, timeout=120
    )
    assert out.stdout.strip() == str(ORDER)


def test_every_place_of_an_order_is_as_likely() -> None:
    """Where prompt 0 of 5 comes, over 4,000 epochs: 800 times at each place, give or take 5 standard deviations."""
    places = [int(np.flatnonzero(permutation("f", 3, epoch, 5) == 0)[0]) for epoch in range(4000)]
    counts = np.bincount(places, minlength=5)
    assert (abs(counts - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)).all()


def test_the_seed_belongs_to_the_occurrence() -> None:
    seeds = [seed for _, seed in drawn(Uniform(prompts(7), "f", 5), 700)]
    assert len(set(seeds)) == 700
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [occurrence_seed(5, i // 7, i % 7) for i in range(700)]
    assert not set(seeds) & {seed for _, seed in drawn(Uniform(prompts(7), "f", 6), 700)}


def test_drawing_leaves_the_prompt_otherwise_as_it_is() -> None:
    only = replace(prompt_of(name="x"), metadata={"level": 1}, source="s")
    found = Uniform([only], "f", 0).draw()
    assert replace(found, seed=0) == only


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, "'other', but this run's is 'f'"),
        ({"seed": 1}, "seed is 1, but this run's is 0"),
        ({"prompts": 3}, "prompts is 3"),
        ({"kind": "else"}, "kind is 'else'"),
        ({"cursor": -1}, "cursor is -1"),
        ({"cursor": "5"}, "cursor is '5'"),
        ({"cursor": None}, "cursor is None"),
        ({"fingerprint": None}, "fingerprint is None"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(
    kind: type[Uniform], change: dict[str, Any], message: str
) -> None:
    curriculum = kind(prompts(4), "f", 0)
    drawn(curriculum, 3)
    before = curriculum.state_dict()
    with pytest.raises(CheckpointError, match=message) as caught:
        curriculum.load_state_dict({**before, **change})
    assert caught.value.exit_code == NO_CHECKPOINT
    assert curriculum.state_dict() == before


@BOTH
def test_an_empty_state_is_refused(kind: type[Uniform]) -> None:
    with pytest.raises(CheckpointError):
        kind(prompts(4), "f", 0).load_state_dict({})


@pytest.mark.parametrize(
    "records", [None, [1], {"a": [0.5, 1]}, {"1": 0.5}, {"1": ["x", 1]}, {"9": [0.5, 1]}, {"1": [2.0, 1]}]
)
def test_pass_rates_that_cannot_be_read(records: object) -> None:
    curriculum = Difficulty(prompts(4), "f", 0)
    with pytest.raises(CheckpointError, match="pass rates"):
        curriculum.load_state_dict({**curriculum.state_dict(), "records": records})


def test_no_prompts_or_prompts_of_one_name() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Uniform([], "f", 0)
    with pytest.raises(ValueError, match="share an id"):
        Difficulty([prompt_of(), prompt_of()], "f", 0)


# Difficulty


def test_prompts_outside_the_band_are_passed_over_and_tried_again_later() -> None:
    curriculum = Difficulty(prompts(6), "f", 0, Band(low=0.25, high=0.75, again=3))
    rates = {"p0": 0.0, "p1": 1.0}  # the others pass half of the time
    epochs: dict[int, list[str]] = {}
    while curriculum.epoch < 7:
        prompt = curriculum.draw()
        epochs.setdefault((curriculum.cursor - 1) // 6, []).append(prompt.id)
        rate = rates.get(prompt.id, 0.5)
        curriculum.observe(group_of([1.0] * int(4 * rate) + [0.0] * int(4 - 4 * rate), [2] * 4, prompt=prompt))
    everything, inside = {f"p{i}" for i in range(6)}, {f"p{i}" for i in range(2, 6)}
    assert set(epochs[0]) == everything  # nobody knows yet
    assert set(epochs[1]) == set(epochs[2]) == inside
    assert set(epochs[3]) == everything
    assert set(epochs[4]) == set(epochs[5]) == inside
    assert curriculum.passed_over >= 8


def test_when_every_prompt_is_outside_one_is_drawn_all_the_same() -> None:
    curriculum = Difficulty(prompts(3), "f", 0, Band(low=0.4, high=0.6, again=1000))
    assert len(judged(curriculum, lambda _: 0.0, 20)) == 20
    assert curriculum.passed_over == 3 * 17


def test_drawn_prompts_keep_the_seed_of_their_place() -> None:
    uniform, difficulty = Uniform(prompts(5), "f", 0), Difficulty(prompts(5), "f", 0)
    all_seeds = dict.fromkeys(drawn(uniform, 60))
    ids = [difficulty.draw() for _ in range(5)]
    difficulty.observe(group_of([1.0, 1.0], [2, 2], prompt=ids[0]))
    assert all((p.id, p.seed) in all_seeds for p in [*ids, *(difficulty.draw() for _ in range(20))])


def test_the_pass_rate_is_a_running_mean_of_the_policys_judged_answers() -> None:
    curriculum = Difficulty(prompts(1), "f", 0, Band(recent=0.25))
    prompt = curriculum.draw()

    def rate(rewards: list[float]) -> float:
        curriculum.observe(group_of(rewards, [2] * len(rewards), prompt=prompt))
        return curriculum.records[0].rate

    assert rate([1.0, 0.0]) == 0.5
    assert rate([1.0, 1.0]) == 0.25 * 1.0 + 0.75 * 0.5
    assert rate([math.nan, 0.0]) == 0.75 * 0.625
    assert rate([math.nan, math.nan]) == 0.75 * 0.625  # nobody was judged: nothing learned


def test_help_does_not_count_as_a_pass() -> None:
    curriculum = Difficulty(prompts(1), "f", 0)
    group = group_of([1.0, 0.0], [2, 2], prompt=curriculum.draw())
    helped = group.samples[0]
    origin = helped.origin.copy()
    origin[-1] = Origin.TEACHER
    curriculum.observe(replace(group, samples=(replace(helped, origin=origin), group.samples[1])))
    assert curriculum.records[0].rate == 0.0


@pytest.mark.parametrize(
    "band", [{"low": 0.6, "high": 0.4}, {"low": -0.1}, {"high": 1.1}, {"recent": 0.0}, {"again": 0}]
)
def test_a_band_that_makes_no_sense(band: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        Band(**band)
