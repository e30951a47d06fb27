"""Packing and the one way to average."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core.batch import MicroBatch, Shares, Totals, pack, shared_prompt
from rlkd.core.types import Group, Origin
from rlkd.workers.threads import plan
from tests.toys import group_of, prompt_of


@st.composite
def steps(draw: st.DrawFn) -> list[Group]:
    groups = []
    for i in range(draw(st.integers(1, 5))):
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
        prompt = prompt_of(draw(st.integers(1, 8)), f"p{i}")
        groups.append(group_of([0.0] * len(lengths), lengths, prompt=prompt))
    return groups


def key(tokens: torch.Tensor | np.ndarray) -> tuple[int, ...]:
    return tuple(int(t) for t in tokens)


@settings(deadline=None, max_examples=60)
@given(groups=steps(), ranks=st.integers(1, 4), max_tokens=st.integers(20, 80))
def test_pack_loses_and_repeats_nothing(groups: list[Group], ranks: int, max_tokens: int) -> None:
    packed = pack(groups, ranks, max_tokens)
    assert all(len(turn) == ranks for turn in packed)
    seen = [key(x.tokens[x.segment == i]) for turn in packed for x in turn if x.weight for i in range(x.samples)]
    assert sorted(seen) == sorted(key(s.tokens) for g in groups for s in g.samples)


@settings(deadline=None, max_examples=60)
@given(groups=steps(), ranks=st.integers(1, 4), max_tokens=st.integers(20, 80))
def test_pack_keeps_the_token_budget(groups: list[Group], ranks: int, max_tokens: int) -> None:
    """Counting a group's shared prompt once, as the forward pass does."""
    from rlkd.core.prefix import layout

    for turn in pack(groups, ranks, max_tokens):
        for x in turn:
            assert len(layout(x).computed) <= max_tokens


def test_whole_groups_stay_together() -> None:
    groups = [group_of([0.0] * 4, [5, 6, 7, 8]), group_of([0.0] * 4, [5, 6, 7, 8], prompt=prompt_of(3, "q"))]
    packed = pack(groups, 1, 30, whole_groups=True)
    assert [x.samples for turn in packed for x in turn] == [4, 4]
    assert len(pack(groups, 1, 20)) > 2


def test_a_sample_over_the_budget_is_an_error_that_says_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"a sample of 43 tokens does not fit in learner\.max_tokens=20"):
        pack([group_of([0.0], [40])], 1, 20)


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([], 1, 20)


def test_ranks_are_balanced() -> None:
    groups = [group_of([0.0] * 4, [n] * 4, prompt=prompt_of(3, f"p{n}")) for n in range(1, 33)]
    packed = pack(groups, 4, 10_000)
    load = [sum(len(turn[rank].tokens) * bool(turn[rank].weight) for turn in packed) for rank in range(4)]
    assert max(load) <= 1.1 * min(load)


def test_shared_prompt_stops_at_the_first_difference() -> None:
    group = group_of([0.0, 0.0], [2, 2])
    assert shared_prompt(group.samples) == 3
    other = group_of([0.0], [2], prompt=prompt_of(2))
    assert shared_prompt([group.samples[0], other.samples[0]]) == 2


def micro() -> MicroBatch:
    return pack([group_of([0.0, 1.0], [2, 4])], 1, 100)[0][0]


def test_unknown_values_do_not_reach_a_mean() -> None:
    x = micro()
    values = torch.where(x.mask(Origin.POLICY), 2.0, torch.nan)
    for norm in ("token", "sequence"):
        assert float(x.mean(values, Origin.POLICY, norm)) == pytest.approx(2.0)  # type: ignore[arg-type]


def test_constant_norm_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="length"):
        micro().mean(torch.zeros(12), Origin.POLICY, "constant")


def test_nobody_wrote_such_tokens() -> None:
    x = micro()
    assert float(x.mean(torch.ones(12), Origin.TEACHER)) == 0.0
    assert x.totals.tokens[int(Origin.TEACHER)] == 0


def test_pickles_as_numpy_and_comes_back_the_same() -> None:
    x = micro()
    again = pickle.loads(pickle.dumps(x))
    assert torch.equal(again.tokens, x.tokens)
    assert torch.equal(again.behavior_logp.isnan(), x.behavior_logp.isnan())
    assert again.totals == x.totals
    assert all(not isinstance(v, torch.Tensor) for v in x.__getstate__().values())


def test_totals_count_unions_once() -> None:
    totals = Totals.of(group_of([0.0, 0.0], [2, 4]).samples)
    assert totals.tokens[int(Origin.POLICY)] == totals.tokens[int(Origin.POLICY | Origin.TEACHER)] == 6
    assert totals.sequences[int(Origin.POLICY)] == 2


def test_shares_of_all_ranks_add_up_and_copies_do_not_count() -> None:
    a, b = Shares(), Shares()
    a.add({"loss": torch.tensor(1.0)}, {"worst": torch.tensor(3.0)}, 1.0)
    b.add({"loss": torch.tensor(2.0)}, {"worst": torch.tensor(1.0)}, 1.0)
    b.add({"loss": torch.tensor(9.0)}, {"worst": torch.tensor(9.0)}, 0.0)
    assert Shares.merged([a, b]) == {"loss": 3.0, "worst": 3.0}


@given(
    cores=st.integers(1, 256), workers=st.integers(1, 16), ranks=st.integers(1, 16), scorers=st.integers(0, 8),
    overlap=st.booleans(),
)  # fmt: skip
def test_threads_never_exceed_the_cores(cores: int, workers: int, ranks: int, scorers: int, overlap: bool) -> None:
    threads = plan(cores, workers, ranks, scorers, overlap)
    assert min(threads.rollout, threads.learner, threads.scorer) >= 1
    beside = workers * threads.rollout + scorers
    learning = ranks * threads.learner
    if overlap:
        assert beside + learning <= max(cores, workers + ranks + scorers)
    else:
        assert beside <= max(cores, workers + scorers)
        assert learning <= max(cores, ranks)
