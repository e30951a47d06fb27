"""SFT on demonstrations, and on the policy's own right answers."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlkd.algorithms.rsft import RSFT
from rlkd.algorithms.sft import SFT
from rlkd.core.advantage import with_advantages
from rlkd.core.ports import Algorithm, Rollout, Services, as_demonstration
from rlkd.core.types import Demonstration, Finish, Group, Origin, Prompt, Sample, Signal
from rlkd.rollout.traced import Traced
from tests.fakes import FakePolicy, FakeVerify
from tests.toys import group_of, prompt_of, step_loss


def demonstrated(*lengths: int, seed: int = 0) -> Prompt:
    """Demonstration i is 10+i, 11+i, … ."""
    demonstrations = tuple(
        Demonstration(f"t{i}", (10 + i + np.arange(n)).astype(np.int32)) for i, n in enumerate(lengths)
    )
    return replace(prompt_of(2), demonstrations=demonstrations, seed=seed)


class Quiet(FakePolicy):
    """A policy that must not be asked."""

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        raise AssertionError("SFT samples nothing")


def drawn(prompt: Prompt, rollout: Traced, **services: Any) -> tuple[Group, list[tuple[str, str]]]:
    reports: list[tuple[str, str]] = []
    ask = Services(Quiet(), FakeVerify(), report=lambda kind, text: reports.append((kind, text)), **services)
    return asyncio.run(rollout(prompt, ask, {})), reports


def as_group(prompt: Prompt) -> Group:
    return Group(prompt, tuple(as_demonstration(prompt, d, (0, 0)) for d in prompt.demonstrations))


def stepped(
    algorithm: Any, groups: Sequence[Group], logps: Sequence[Sequence[float]], ranks: int = 1, max_tokens: int = 1000
) -> tuple[float, list[list[float]]]:
    """`step_loss`, which tells samples apart by their advantages, too: here they have none."""
    marked = [with_advantages(g, np.zeros(len(g.samples))) for g in groups]
    return step_loss(algorithm, marked, logps, ranks, max_tokens)


def test_the_group_is_the_demonstrations() -> None:
    group, reports = drawn(demonstrated(2, 3), Traced(samples=8))
    assert [s.tokens.tolist() for s in group.samples] == [[1, 2, 10, 11], [1, 2, 11, 12, 13]]
    assert group.samples[0].origin.tolist() == [Origin.PROMPT] * 2 + [Origin.TEACHER] * 2
    assert all(np.isnan(s.behavior_logp).all() for s in group.samples)
    assert all(s.finish == Finish.STOP for s in group.samples)
    assert reports == []


def test_at_most_so_many_by_the_prompts_seed() -> None:
    def first_tokens(seed: int) -> tuple[int, ...]:
        group, _ = drawn(demonstrated(*[2] * 6, seed=seed), Traced(samples=2))
        return tuple(int(s.tokens[2]) for s in group.samples)

    assert first_tokens(1) == first_tokens(1)
    assert len({first_tokens(s) for s in range(20)}) > 3
    assert all(len(set(first_tokens(s))) == 2 for s in range(20))


def test_a_prompt_without_a_demonstration_is_turned_away_and_counted() -> None:
    group, reports = drawn(prompt_of(2), Traced())
    assert SFT().credit(group).samples == ()
    assert reports == [("traces", "prompt p has no demonstration")]


def test_only_right_ones() -> None:
    """FakeVerify: a demonstration is right if its first token is odd."""
    group, reports = drawn(demonstrated(2, 2, 2, 2), Traced(samples=8, only_right=True))
    assert [int(s.tokens[2]) for s in group.samples] == [11, 13]
    assert all(s.reward == 1.0 for s in group.samples)
    assert reports == []
    group, reports = drawn(demonstrated(2), Traced(only_right=True))
    assert group.samples == ()
    assert "none of its 1 demonstrations is right" in reports[0][1]


def test_one_that_nobody_could_judge_is_not_right() -> None:
    class Mute(FakeVerify):
        async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> tuple[Sample, ...]:
            return tuple(samples)

    ask = Services(Quiet(), Mute())
    assert asyncio.run(Traced(only_right=True)(demonstrated(2), ask, {})).samples == ()


def test_traces_of_the_run_come_first() -> None:
    async def traces(prompt: Prompt) -> tuple[Demonstration, ...]:
        return (*prompt.demonstrations, Demonstration("live", np.array([77, 78], np.int32)))

    group, _ = drawn(demonstrated(2), Traced(samples=4), traces=traces)
    assert [int(s.tokens[2]) for s in group.samples] == [10, 77]


@pytest.mark.parametrize(("norm", "value"), [("token", 13 / 4), ("sequence", (1 + 4) / 2)])
def test_loss_is_the_mean_negative_log_likelihood(norm: Any, value: float) -> None:
    """Demonstrations of 1 and 3 tokens with log-probs −1 and −3, −4, −5; gradients −1/M and −1/(N·|τ|)."""
    groups = [as_group(demonstrated(1, 3))]
    found, gradient = stepped(SFT(norm=norm), groups, [[-1.0], [-3.0, -4.0, -5.0]])
    assert found == pytest.approx(value)
    each = [[-1 / 4], [-1 / 4] * 3] if norm == "token" else [[-1 / 2], [-1 / 6] * 3]
    assert gradient[0] == pytest.approx(each[0])
    assert gradient[1] == pytest.approx(each[1])


@pytest.mark.parametrize("norm", ["token", "sequence"])
def test_loss_does_not_depend_on_the_split(norm: Any) -> None:
    groups = [as_group(demonstrated(1, 3)), as_group(replace(demonstrated(4, 2), id="q"))]
    logps = [[-1.0], [-3.0, -4.0, -5.0], [-0.5] * 4, [-2.0, -1.0]]
    groups[1] = replace(
        groups[1], samples=tuple(replace(s, tokens=(s.tokens + 50).astype(np.int32)) for s in groups[1].samples)
    )
    whole, parts = (stepped(SFT(norm=norm), groups, logps, r, m) for r, m in ((1, 1000), (3, 6)))
    assert parts[0] == pytest.approx(whole[0])
    assert [g for p in parts[1] for g in p] == pytest.approx([g for p in whole[1] for g in p])


def test_sft_learns_from_the_teachers_tokens_only() -> None:
    group = group_of([1.0, 0.0], [2, 3])
    value, gradient = stepped(SFT(), [group], [[-1.0] * 2, [-1.0] * 3])
    assert value == 0.0
    assert max(abs(g) for p in gradient for g in p) == 0.0


# ---- rejection sampling


def test_the_right_answers_are_kept() -> None:
    group = group_of([1.0, 0.0, 1.0, 0.5], [2, 2, 3, 2])
    kept = RSFT().credit(group)
    assert kept.samples == (group.samples[0], group.samples[2])
    value, gradient = stepped(RSFT(), [kept], [[-1.0, -2.0], [-3.0, -4.0, -5.0]])
    assert value == pytest.approx(3.0)
    assert gradient[0] == pytest.approx([-0.2] * 2)


def test_a_group_without_a_right_answer_is_turned_away() -> None:
    assert RSFT().credit(group_of([0.0, 0.5], [2, 2])).samples == ()


def test_keep_one_draws_among_the_best() -> None:
    def kept(seed: int, rewards: Sequence[float]) -> int:
        group = group_of(rewards, [1] * len(rewards), prompt=replace(prompt_of(), seed=seed))
        (sample,) = RSFT(keep="one").credit(group).samples
        return [s is sample for s in group.samples].index(True)

    assert kept(5, [1, 0, 1, 1]) == kept(5, [1, 0, 1, 1])
    assert {kept(s, [1, 0, 1, 1]) for s in range(40)} == {0, 2, 3}
    assert {kept(s, [0.7, 0, 0.9, 0.7]) for s in range(10)} == {2}


def test_an_answer_that_was_cut_is_not_kept() -> None:
    """Its end was never written: to imitate it would teach not to end."""
    group = group_of([1.0, 1.0], [2, 2])
    cut = replace(group, samples=(replace(group.samples[0], finish=Finish.LENGTH), group.samples[1]))
    assert RSFT().credit(cut).samples == (group.samples[1],)


def test_are_algorithms() -> None:
    for algorithm in (SFT(), RSFT()):
        assert isinstance(algorithm, Algorithm)
        assert isinstance(algorithm.rollout, Rollout)
        assert algorithm.needs == frozenset()
        assert algorithm.problems() == []
        assert not algorithm.wants(group_of([1.0, 0.0], [1, 1]), "reference").any()
    assert SFT(live=True).needs == {Signal.TEACHER_TEXT}
    assert "rollout.samples=0" in SFT(rollout=Traced(samples=0)).problems()[0]
