"""pass@k against brute force; intervals against what they promise."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.train.passk import PassAtK, bootstrap, evaluation, pass_at_k, unbiased, wilson


@given(n=st.integers(1, 9), data=st.data())
def test_equals_brute_force(n: int, data: st.DataObject) -> None:
    """The share of all k-subsets of the answers with a right one in it."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([i < c for i in range(n)], k))
    assert unbiased(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


@given(n=st.integers(1, 3000), data=st.data())
def test_is_stable_for_many_answers(n: int, data: st.DataObject) -> None:
    """Against exact fractions of the factorial form."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert unbiased(n, c, k) == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


def expectation(p: float, n: int, k: int, estimate) -> float:  # type: ignore[no-untyped-def]
    """The exact mean of an estimate over all numbers of right answers, each right with probability p."""
    return sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimate(n, c, k) for c in range(n + 1))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_is_unbiased_and_the_naive_form_is_not(p: float, k: int) -> None:
    truth = 1 - (1 - p) ** k
    assert expectation(p, 8, k, unbiased) == pytest.approx(truth)
    if k > 1:
        naive = expectation(p, 8, k, lambda n, c, k: 1 - (1 - c / n) ** k)
        assert naive < truth - 1e-5


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40), st.integers(1, 6))
@settings(deadline=None)
def test_mean_and_interval_fit_together(pairs: list[tuple[int, int]], k: int) -> None:
    right, judged = [min(p) for p in pairs], [max(p) for p in pairs]
    e = pass_at_k(right, judged, k)
    enough = [(c, n) for c, n in zip(right, judged, strict=True) if n >= k]
    assert (e.prompts, e.left_out) == (len(enough), len(pairs) - len(enough))
    if enough:
        assert e.value == pytest.approx(np.mean([unbiased(n, c, k) for c, n in enough]))
        assert 0 <= e.low <= e.value + 1e-12
        assert e.value - 1e-12 <= e.high <= 1
        assert e.high > e.low
    else:
        assert math.isnan(e.value)
        assert e.interval == "none"


@pytest.mark.parametrize(("right", "judged", "k"), [([5], [4], 1), ([-1], [4], 1), ([1], [4], 0), ([1, 1], [4], 1)])
def test_counts_that_cannot_be_are_an_error(right: list[int], judged: list[int], k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@k needs|0 ≤ right ≤ judged"):
        pass_at_k(right, judged, k)


def test_wilson_matches_published_values() -> None:
    """Agresti & Coull 1998 and R's binom.confint(method="wilson")."""
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_wilson_covers_the_truth(p: float) -> None:
    """Exactly, over all outcomes of 200 tosses; the normal interval does not near the ends."""

    def coverage(interval) -> float:  # type: ignore[no-untyped-def]
        held = 0.0
        for c in range(201):
            low, high = interval(c / 200, 200)
            held += math.comb(200, c) * p**c * (1 - p) ** (200 - c) * (low <= p <= high)
        return held

    assert 0.93 <= coverage(wilson) <= 0.98
    if p in (0.02, 0.99):
        normal = lambda q, n: (q - 1.96 * math.sqrt(q * (1 - q) / n), q + 1.96 * math.sqrt(q * (1 - q) / n))  # noqa: E731
        assert coverage(normal) < 0.93


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).integers(0, 5, 400) / 4
    low, high = bootstrap(values, seed=3)
    assert (low, high) == bootstrap(values, seed=3)
    assert (low, high) != bootstrap(values, seed=4)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)


def held(k: int, estimate, trials: int = 200) -> float:  # type: ignore[no-untyped-def]
    """How often an interval holds the truth: 40 prompts, 8 answers, most prompts easy."""
    rng = np.random.default_rng(0)
    truth = float((1 - (1 - rng.beta(4, 0.5, 200_000)) ** k).mean())
    intervals = (estimate(rng.binomial(8, rng.beta(4, 0.5, 40)).tolist()) for _ in range(trials))
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_several_answers_a_prompt_are_covered_where_the_bootstrap_alone_is_not() -> None:
    def ours(right: list[int]) -> tuple[float, float]:
        e = pass_at_k(right, [8] * 40, 4)
        return e.low, e.high

    assert held(4, ours) >= 0.93
    alone = held(4, lambda right: bootstrap(np.array([unbiased(8, c, 4) for c in right])))
    assert alone < 0.8


@pytest.mark.parametrize(("n", "interval"), [(1, "wilson"), (4, "bootstrap")])
def test_which_interval(n: int, interval: str) -> None:
    right = np.random.default_rng(0).integers(0, n + 1, 100).tolist()
    assert pass_at_k(right, [n] * 100, 1).interval == interval


def test_one_value_everywhere_is_not_certainty() -> None:
    e = pass_at_k([4] * 100, [4] * 100, 1)
    assert (e.value, e.interval) == (1.0, "wilson")
    assert e.low < 0.97


def test_unjudged_answers_are_left_out_not_counted_as_wrong() -> None:
    result = evaluation([1, 1, 0], [1, 1, 0], [1], [1.0, 1.0, math.nan], [3, 4, 5], 1)
    (e,) = result.estimates
    assert (e.value, e.prompts, e.left_out) == (1.0, 2, 1)
    assert (result.prompts, result.answers, result.unjudged) == (3, 3, 1)
    assert result.reward == 1.0
    assert result.length == 4.0
    assert result.truncated == pytest.approx(1 / 3)
    assert result.metrics()["eval/pass@1"] == 1.0
    assert result.metrics()["eval/unjudged"] == 1.0
    assert result.pass_at[1] is e


def test_nothing_judged_is_unknown_not_zero() -> None:
    result = evaluation([0], [0], [1, 8], [math.nan], [5], 0)
    assert all(math.isnan(e.value) for e in result.estimates)
    assert math.isnan(result.reward)


def test_reads_as_the_issue_wants_it() -> None:
    assert str(pass_at_k([1] * 156 + [0] * 344, [1] * 500, 1)) == "pass@1 0.312 [0.273, 0.354]"
    assert isinstance(pass_at_k([1], [1], 1), PassAtK)
