"""On-policy distillation: golden numbers K6 through the public path, and what it shares with KDRL."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.opd import OPD
from rlkd.core.ports import Algorithm
from rlkd.core.types import Signal
from rlkd.rollout import Sampled
from tests.distill_help import answers, differs, metrics_of, step, step_of, taught
from tests.test_kdrl import P_TEACHER, P, logs, random_taught, silent, two_rows

SEQUENCE = [0.179217, -0.102245, 0.086015]  # gradient of the sequence's reverse KL
TOKEN = [0.195567, -0.102245, 0.086015]  # of the KL at each prefix, prefixes taken as given
STUDENT, TEACHER = (0.3, -0.4, 0.8), (-0.5, 0.6, 0.1)  # first step; second after 0; second after 1


def places(logits: Any, first: int) -> torch.Tensor:
    """Logits of the two steps over the tokens 0 and 1."""
    chosen = torch.stack([logits[0], logits[1 + first]])
    return torch.stack([torch.zeros(2), chosen], 1)


def expectation(algorithm: Any) -> tuple[float, list[float]]:
    """Of the loss over all four answers of two binary steps, and of its gradient at the three logits."""
    logits = torch.tensor(STUDENT, requires_grad=True)
    total = torch.zeros(())
    for first, second in product((0, 1), (0, 1)):
        tokens = [first, second]
        own = torch.log_softmax(places(logits, first), -1)[range(2), tokens].detach()
        theirs = torch.log_softmax(places(torch.tensor(TEACHER), first), -1)[range(2), tokens]
        group = taught(answers([tokens], [0], [own.tolist()]), [theirs.tolist()])
        loss, _ = step_of(algorithm, [group], [places(logits, first)])
        total = total + own.sum().exp() * loss
    (gradient,) = torch.autograd.grad(total, logits)
    return float(total.detach()), gradient.tolist()


def test_k6_token_level() -> None:
    value, gradient = expectation(OPD(norm="sequence-sum"))
    assert value == pytest.approx(0.164016, abs=1e-6)
    assert gradient == pytest.approx(TOKEN, abs=1e-6)


def test_k6_reward_to_go_is_the_gradient_of_the_sequence() -> None:
    assert expectation(OPD(norm="sequence-sum", reward_to_go=True))[1] == pytest.approx(SEQUENCE, abs=1e-6)


def test_k6_the_two_differ_at_the_first_step_alone() -> None:
    assert TOKEN[0] != SEQUENCE[0]
    options: dict[str, Any] = {"beta_0": 1.0, "beta_decay": 0.0, "norm": "sequence-sum"}
    for form in ("advantage", "loss"):
        assert expectation(KDRL(form=form, **options))[1] == pytest.approx(TOKEN, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), norm=st.sampled_from(["token", "sequence", "sequence-sum"]))
def test_it_is_kdrl_without_rewards(seed: int, norm: Any) -> None:
    groups, logps = random_taught(seed)
    level = [replace(g, samples=tuple(replace(s, reward=0.0) for s in g.samples)) for g in groups]
    a = step(OPD(norm=norm), groups, logps)[1]
    b = step(KDRL(beta_0=1.0, beta_decay=0.0, norm=norm), level, logps)[1]
    assert differs(a, b) < 1e-6


@pytest.mark.parametrize("reward_to_go", [False, True])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 3), max_tokens=st.sampled_from([14, 30]))
def test_gradient_does_not_depend_on_the_split(reward_to_go: bool, seed: int, ranks: int, max_tokens: int) -> None:
    groups, logps = random_taught(seed)
    algorithm = OPD(reward_to_go=reward_to_go)
    value, gradient = step(algorithm, groups, logps)
    split_value, split = step(algorithm, groups, logps, ranks=ranks, max_tokens=max_tokens)
    assert split_value == pytest.approx(value, abs=5e-6)
    assert differs(split, gradient) < 5e-6


def test_rewards_have_no_part_in_it() -> None:
    a, b = (step(OPD(), [two_rows(r)], logs(P))[1] for r in ((1, 0), (0, 1)))
    assert differs(a, b) == 0.0


def test_the_gradient_by_hand() -> None:
    ratio = [np.log(np.array(q) / np.array(p)) for p, q in zip(P, P_TEACHER, strict=True)]
    _, gradient = step(OPD(), [two_rows()], logs(P))
    assert differs(gradient, [-r / 5 for r in ratio]) < 1e-6
    _, gradient = step(OPD(reward_to_go=True), [two_rows()], logs(P))
    assert differs(gradient, [-np.cumsum(r[::-1])[::-1] / 5 for r in ratio]) < 1e-6


@pytest.mark.parametrize("reward_to_go", [False, True])
def test_an_unknown_token_adds_nothing(reward_to_go: bool) -> None:
    """Its own reward is left out; what comes after it still counts for what comes before."""
    group = silent(two_rows(), 1, 0)
    _, gradient = step(OPD(reward_to_go=reward_to_go), [group], logs(P))
    assert gradient[1] == [0, 0]
    assert metrics_of(OPD(), [group], logs(P))["teacher_missing"] == pytest.approx(2 / 5)
    assert np.isfinite(gradient[0]).all()


def test_one_sample_is_enough() -> None:
    assert OPD(rollout=Sampled(samples=1)).problems() == []
    group = taught(answers([[5, 6]], [1], [[-1.0, -1.0]]), [[-2.0, -0.5]])
    assert step(OPD(), [group], [[-1.0, -1.0]])[1][0] == pytest.approx([0.5, -0.25])


def test_contradictions_are_named() -> None:
    assert OPD().problems() == []
    assert isinstance(OPD(), Algorithm)
    assert OPD().needs == {Signal.TEACHER}
    assert OPD(standardize=True).problems()[0].startswith("standardize")
    assert OPD(beta=0.1).problems()[0].startswith("beta=")
    assert OPD(dual_clip=3.0).problems()[0].startswith("dual_clip")
    assert OPD(rollout=Sampled(samples=0)).problems()[0].startswith("rollout.samples")
