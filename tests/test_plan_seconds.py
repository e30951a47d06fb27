"""Seconds: what they fall and grow with, and the arithmetic of performance.md."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.plan import seconds
from rlkd.plan.hardware import GPUS
from rlkd.plan.seconds import Learned
from rlkd.plan.work import Lengths, assumed, work_of
from tests.plan_help import MACHINE, plan, recipe, shape

H100, H200 = GPUS["H100"], GPUS["H200"]
LONG = Lengths(300.0, 3000.0, 512, 16384, "a test")


def big(**changes: Any) -> Any:
    """A step that is worth many GPUs."""
    wanted = {"schedule__groups_per_step": 512, "algorithm__rollout": type(recipe().algorithm.rollout)(16),
              "sampler__max_tokens": 16384, "learner__max_tokens": 32768, "learner__gradient_checkpointing": True,
              "model__context": 32768, "learner__zero_stage": 3}  # fmt: skip
    return recipe(**{**wanted, **changes})


@settings(max_examples=8, deadline=None)
@given(ranks=st.integers(1, 256), workers=st.integers(1, 256), stale=st.integers(0, 8))
def test_time_falls_with_gpus(ranks: int, workers: int, stale: int) -> None:
    """While the network is not what is waited for: one node's link serves all."""
    few = plan(big(learner__ranks=8 * ranks, sampler__workers=workers, schedule__staleness=stale), lengths=LONG)
    many = plan(big(learner__ranks=16 * ranks, sampler__workers=2 * workers, schedule__staleness=stale), lengths=LONG)
    assert many.step.learn < few.step.learn * 1.01
    assert many.step.rollout <= few.step.rollout
    assert many.step.step <= few.step.step * 1.01
    assert many.step.step > 0


@settings(max_examples=8, deadline=None)
@given(stale=st.integers(0, 8), workers=st.integers(1, 64), ranks=st.integers(1, 64))
def test_bubbles_and_idle_are_shares(stale: int, workers: int, ranks: int) -> None:
    step = plan(big(schedule__staleness=stale, sampler__workers=workers, learner__ranks=ranks), lengths=LONG).step
    assert 0 <= step.bubbles < 1
    assert all(0 <= share < 1 for share in step.idle.values())


@settings(max_examples=8, deadline=None)
@given(stale=st.integers(0, 8), workers=st.integers(1, 64))
def test_staleness_never_makes_a_step_longer(stale: int, workers: int) -> None:
    now = plan(big(schedule__staleness=stale, sampler__workers=workers), lengths=LONG).step
    later = plan(big(schedule__staleness=stale + 1, sampler__workers=workers), lengths=LONG).step
    assert later.step <= now.step


def test_a_synchronous_step_is_the_sum_of_its_stages() -> None:
    s = plan(big(), lengths=LONG).step
    assert s.step == pytest.approx(s.rollout + s.learn + s.sync)


def test_a_stale_step_is_the_longest_of_what_bounds_it() -> None:
    s = plan(big(schedule__staleness=1, sampler__workers=64), lengths=LONG).step
    assert s.bound in ("learning", "sampling", "the longest answers")
    assert s.step >= s.learn + s.sync - 1e-9
    assert s.step >= s.rollout / 2 - 1e-9


def test_decoding_as_in_performance_2_4() -> None:
    """One H200, 7B: 174 tokens/s of one sequence; 8.2 k of 64 with 2 k of context."""
    config, of = recipe(sampler__gpu_memory_utilization=0.9), shape()
    for sequences, context, expected in ((1, 0, 174), (64, 2000, 8200)):
        work = work_of(config, Lengths(float(context), 2e-9, 4096, 1, "a test"))
        took = seconds.decode_s(config, of, work, H200, 1.0, float(sequences))
        assert sequences / took == pytest.approx(expected, rel=0.12)


def test_training_as_in_performance_2_4() -> None:
    """7B on one H200 at 40 % of the peak: 8.7 k tokens a second, without the head's second pass and attention."""
    config, of = recipe(learner__zero_stage=None), shape()
    work = work_of(config, Lengths(0.0, 48.0, 1, 48, "a test"))
    flops = 6 * of.parameters * work.computed
    assert seconds.learn_flops(config, of, work) == pytest.approx(flops, rel=0.06)
    assert work.computed * H200.train * H200.flops / seconds.learn_flops(config, of, work) == pytest.approx(
        8700, rel=0.06
    )


def test_checkpointing_costs_a_third_more() -> None:
    config, again = recipe(), recipe(learner__gradient_checkpointing=True)
    work = work_of(config, assumed(config, shape()))
    ratio = seconds.learn_flops(again, shape(), work) / seconds.learn_flops(config, shape(), work)
    assert 1.25 < ratio < 4 / 3 + 0.01


def test_the_longest_answer() -> None:
    work = work_of(recipe(), Lengths(10.0, 20.0, 20, 48, "a test"))
    assert seconds.longest_answer(work, 1.0) == 20
    assert seconds.longest_answer(work, 1e6) == 48
    assert seconds.longest_answer(work, math.e) == pytest.approx(40)


def test_hf_samples_one_group_after_the_other() -> None:
    fast, slow = (plan(recipe(sampler__engine=e), hardware=MACHINE, model="Qwen2.5-0.5B").step for e in ("vllm", "hf"))
    assert slow.rollout > 2 * fast.rollout


def test_answers_of_others_are_not_sampled() -> None:
    assert plan(recipe("sft-tiny"), "SmolLM2-135M", MACHINE).step.rollout == 0
    assert plan(recipe("grpo-tiny"), "SmolLM2-135M", MACHINE).step.rollout > 0


def test_what_was_measured_here_is_used_and_split_over_ranks() -> None:
    learned = Learned(0.1, 0.01, 1e-4, 1e-5)
    assert learned.seconds(2, 1000.0, 10) == pytest.approx(2 * 0.2 + 1000 * 2e-4)
    one = plan(recipe(), "SmolLM2-135M", MACHINE, learned=learned).step.learn
    other = plan(recipe(), "SmolLM2-135M", MACHINE, learned=Learned(0.1, 0.01, 2e-4, 2e-5)).step.learn
    work = work_of(recipe(), assumed(recipe(), shape("SmolLM2-135M")))
    assert other - one == pytest.approx(work.computed * (1e-4 + 30 * 1e-5))


def test_scorers_of_their_own_work_beside() -> None:
    config = recipe("kdrl-tiny", ray__share_gpus=False, sampler__max_tokens=4096)
    apart = plan(config).step
    assert apart.score > 0
    assert apart.step == pytest.approx(max(apart.rollout, apart.score) + apart.learn + apart.sync)
    shared = plan(recipe("kdrl-tiny", ray__share_gpus=True, sampler__max_tokens=4096)).step
    assert shared.step == pytest.approx(shared.rollout + shared.score + shared.learn + shared.sync)


def test_sync_through_a_disk_and_to_other_nodes_takes_longer() -> None:
    of = shape()
    one, disk = (seconds.sync_s(recipe(sync__kind=k), of, H100) for k in ("auto", "disk"))
    far = seconds.sync_s(recipe(sync__kind="auto", learner__ranks=16), of, H100)
    assert one < far
    assert one < disk


def test_cost_and_hours() -> None:
    p = plan(big(checkpoint__every=0), lengths=LONG)
    steps_s = p.config.schedule.steps * p.step.step
    assert p.train_s == pytest.approx(steps_s + p.save_s)
    assert p.cost(2.0) == pytest.approx(p.train_s / 3600 * p.devices.total * 2)
    often = plan(big(checkpoint__every=10), lengths=LONG)
    assert often.train_s == pytest.approx(steps_s + 10 * p.save_s)
