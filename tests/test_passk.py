"""pass@k against brute force; intervals against what they promise."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkd.train.passk import bootstrap, estimate, evaluation, pass_at_k, wilson


@given(n=st.integers(1, 9), data=st.data())
def test_equals_brute_force(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [i < c for i in range(n)]
    draws = list(combinations(right, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_is_stable_for_many_answers() -> None:
    assert pass_at_k(1024, 3, 256) == pytest.approx(0.5785, abs=1e-3)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_what_does_not_exist_is_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        pass_at_k(n, c, k)


def test_wilson_matches_published_values() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_intervals_cover_the_truth(p: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.binomial(200, p, 400)
    covered = np.mean([low <= p <= high for low, high in (wilson(int(c), 200) for c in draws)])
    assert 0.92 <= covered <= 0.98


def test_bootstrap_is_seeded_and_around_the_mean() -> None:
    values = np.random.default_rng(1).random(100).tolist()
    assert bootstrap(values) == bootstrap(values)
    low, high = bootstrap(values)
    assert low < np.mean(values) < high


def test_unjudged_answers_are_left_out_not_counted_as_wrong() -> None:
    result = evaluation([1, 1, 0], [1, 1, 0], [1], [1.0, 1.0, math.nan], [3, 4, 5], 1)
    assert result.pass_at[1].value == 1.0
    assert result.pass_at[1].prompts == 2
    assert result.unjudged == 1
    assert result.truncated == pytest.approx(1 / 3)


def test_too_few_answers_for_k_is_unknown() -> None:
    assert math.isnan(estimate([1], [1], 8).value)
