"""Divergences over the teacher's likeliest tokens and a tail, the gap δ and what is made of it, rewards to go."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core import kl
from rlkd.core.divergence import between, of_topk, with_tail

PI, TEACHER = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
REVERSE, FORWARD = 0.223805, 0.193794


def distributions(seed: int, places: int = 4, vocabulary: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the policy, log-probs of the teacher."""
    made = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(places, vocabulary, generator=made, dtype=torch.float64)
    teacher = torch.log_softmax(2 * torch.randn(places, vocabulary, generator=made, dtype=torch.float64), -1)
    return logits, teacher


def exact(name: Any, logits: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    return between(name, torch.log_softmax(logits, -1), teacher, beta)


def topk(name: Any, logits: torch.Tensor, teacher: torch.Tensor, k: int, beta: float = 0.5) -> torch.Tensor:
    top = teacher.topk(k, -1)
    here = torch.ones(len(logits), dtype=torch.bool)
    return of_topk(name, torch.log_softmax(logits, -1).gather(1, top.indices), top.values, here, beta)


@pytest.mark.parametrize(("name", "value"), [("reverse", REVERSE), ("forward", FORWARD)])
def test_golden_values(name: Any, value: float) -> None:
    logits, teacher = torch.tensor([PI]).log(), torch.tensor([TEACHER]).log()
    assert float(exact(name, logits, teacher)) == pytest.approx(value, abs=1e-6)
    assert float(topk(name, logits, teacher, 3)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "gradient"), [("reverse", [0.346243, -0.220389, -0.125854]), ("forward", [0.3, -0.2, -0.1])]
)
def test_golden_gradients(name: Any, gradient: list[float]) -> None:
    logits = torch.tensor([PI], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([TEACHER], dtype=torch.float64).log()
    found = torch.autograd.grad(topk(name, logits, teacher, 3).sum(), logits)[0]
    assert found[0].tolist() == pytest.approx(gradient, abs=1e-5)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_the_tail_makes_a_lower_bound_that_grows_with_k(name: Any, seed: int, k: int) -> None:
    """Lumping tokens together never makes distributions differ more, nor is a divergence negative."""
    logits, teacher = distributions(seed)
    few, more = topk(name, logits, teacher, k), topk(name, logits, teacher, min(k + 3, 12))
    whole = exact(name, logits, teacher)
    assert (few >= -1e-5).all()
    assert (more >= few - 1e-5).all()
    assert (whole >= more - 1e-5).all()
    assert topk(name, logits, teacher, 12).tolist() == pytest.approx(whole.tolist(), abs=2e-5)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_gradient_with_all_tokens_is_the_exact_one(name: Any) -> None:
    logits, teacher = distributions(3)
    logits.requires_grad_()
    a = torch.autograd.grad(topk(name, logits, teacher, 12).sum(), logits)[0]
    b = torch.autograd.grad(exact(name, logits, teacher).sum(), logits)[0]
    assert a.flatten().tolist() == pytest.approx(b.flatten().tolist(), abs=1e-4)


def test_without_a_tail_the_policy_gains_by_leaving_the_teacher() -> None:
    """Why there is a tail: pushing mass out of the teacher's tokens lowers the sum over those tokens below 0."""
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]]).log()
    stays = torch.tensor([[0.6, 0.3, 0.05, 0.05]]).log()
    leaves = torch.tensor([[0.1, 0.05, 0.425, 0.425]]).log()

    def truncated(logits: torch.Tensor) -> float:
        top = teacher.topk(2, -1)
        p = torch.log_softmax(logits, -1).gather(1, top.indices)
        return float((p.exp() * (p - top.values)).sum())

    assert truncated(leaves) < truncated(stays) - 0.2
    assert float(topk("reverse", leaves, teacher, 2)) > float(topk("reverse", stays, teacher, 2)) + 0.2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_jsd_lies_between_its_ends(seed: int) -> None:
    logits, teacher = distributions(seed)
    small = 1e-7
    near_forward = exact("jsd", logits, teacher, small) / small
    near_reverse = exact("jsd", logits, teacher, 1 - small) / small
    assert near_forward.tolist() == pytest.approx(exact("forward", logits, teacher).tolist(), rel=0.02, abs=1e-3)
    assert near_reverse.tolist() == pytest.approx(exact("reverse", logits, teacher).tolist(), rel=0.02, abs=1e-3)
    half = exact("jsd", logits, teacher, 0.5)
    assert (half <= math.log(2) + 1e-9).all()
    swapped = between("jsd", teacher, torch.log_softmax(logits, -1), 0.5)
    assert half.tolist() == pytest.approx(swapped.tolist(), abs=1e-9)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_places_that_are_not_known_give_nothing_and_no_nan(name: Any) -> None:
    logp = torch.full((3, 2), torch.nan)
    logp[0], logp[2] = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -1.5])
    logp.requires_grad_()
    teacher = torch.tensor([[-0.7, -1.2], [-0.7, -1.2], [torch.nan, torch.nan]])
    value = of_topk(name, logp, teacher, torch.tensor([True, False, False]))
    value.sum().backward()
    assert value[1:].tolist() == [0.0, 0.0]
    assert value[0] > 0
    assert logp.grad is not None
    assert logp.grad[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert logp.grad[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_a_forbidden_token_is_finite(name: Any) -> None:
    logp = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    value = of_topk(name, logp, torch.tensor([[-0.01, -torch.inf]]), torch.tensor([True]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert logp.grad is not None
    assert torch.isfinite(logp.grad).all()


def test_the_tail_is_never_nothing() -> None:
    assert with_tail(torch.tensor([[0.5, 0.5]]).log())[0, -1] == pytest.approx(math.log(1e-6), abs=1e-3)
    assert with_tail(torch.tensor([[0.5, 0.2]]).log())[0, -1] == pytest.approx(math.log(0.3), abs=1e-5)


# --- δ


def test_gap_keeps_the_gradient_beyond_the_bound() -> None:
    logp = torch.tensor([-1.0, -2.0, -1.0, -1.0, torch.nan], requires_grad=True)
    other = torch.tensor([-0.5, -torch.inf, -40.0, torch.nan, -1.0])
    here = torch.tensor([True, True, True, False, False])
    delta = kl.gap(logp, other, here)
    assert delta.tolist() == pytest.approx([-0.5, 20.0, 20.0, 0.0, 0.0])
    kl.of_gap("k2", delta).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-0.5, 20.0, 20.0, 0.0, 0.0])


def test_a_clamp_of_the_gap_itself_would_lose_the_gradient() -> None:
    """Negative control of the test above."""
    logp = torch.tensor([-1.0], requires_grad=True)
    (0.5 * (logp - torch.tensor([-40.0])).clamp(-20, 20).square()).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [0.0]


@pytest.mark.parametrize("name", ["k2", "k3", "k3+"])
def test_pull_is_minus_the_gradient_of_the_loss(name: Any) -> None:
    logp = torch.tensor([-0.1, -1.0, -3.0], requires_grad=True)
    delta = kl.gap(logp, torch.tensor([-2.0, -1.0, -0.2]), torch.ones(3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(kl.of_gap(name, delta).sum(), logp)
    assert kl.pull(name, delta).tolist() == pytest.approx((-gradient).tolist(), abs=1e-6)
    assert not kl.pull(name, delta).requires_grad
    assert kl.pull("k1", delta).tolist() == kl.pull("k2", delta).tolist()


# --- rewards to go


def test_to_go_sums_within_each_segment() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 5.0])
    segment = torch.tensor([0, 0, 0, 1, 1, 2])
    assert kl.to_go(values, segment).tolist() == [6.0, 5.0, 3.0, 30.0, 20.0, 5.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_to_go_does_not_depend_on_what_is_packed_beside(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [torch.tensor(20 * rng.standard_normal(n), dtype=torch.float32) for n in sizes]
    together = kl.to_go(torch.cat(parts), torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))
    alone = torch.cat([kl.to_go(p, torch.zeros(len(p), dtype=torch.int64)) for p in parts])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
