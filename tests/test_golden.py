"""Golden numbers G1–G6 and V1–V5 of the design notes (algorithms.md), through the public path Sample → pack → loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlkd.algorithms.cispo import CISPO
from rlkd.algorithms.dapo import DAPO
from rlkd.algorithms.dr_grpo import DrGRPO
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.gspo import GSPO
from rlkd.algorithms.rloo import RLOO
from rlkd.core.types import Group
from tests.toys import group_of, step_loss


def advantages(algorithm: Any, rewards: Sequence[float]) -> list[float]:
    group = algorithm.credit(group_of(rewards=rewards, lengths=[2] * len(rewards)))
    return [float(s.advantage[-1]) for s in group.samples]


@pytest.mark.parametrize(
    ("rewards", "standard", "plain"),
    [
        ([1, 0, 0, 1], [0.866024, -0.866024, -0.866024, 0.866024], [0.5, -0.5, -0.5, 0.5]),
        ([1] + [0] * 7, [2.474867] + [-0.353552] * 7, [0.875] + [-0.125] * 7),
        ([1, 1, 1, 1], [0] * 4, [0] * 4),
        ([0, 0, 0, 0], [0] * 4, [0] * 4),
        ([0.9, 0.1, 0, 1], [0.765091, -0.765091, -0.956363, 0.956363], [0.4, -0.4, -0.5, 0.5]),
    ],
    ids=["G1", "G2", "G3-ones", "G3-zeros", "G4"],
)
def test_advantages(rewards: list[float], standard: list[float], plain: list[float]) -> None:
    assert advantages(GRPO(), rewards) == pytest.approx(standard, abs=2e-6)
    assert advantages(DrGRPO(norm_length=8), rewards) == pytest.approx(plain, abs=1e-6)


def test_g5_not_the_population_deviation() -> None:
    assert advantages(GRPO(), [1, 0, 0, 1])[0] != pytest.approx(0.999998, abs=1e-3)


def one_token(algorithm: Any, advantage: float, rho: float, behavior: float = -1.0, logp: float | None = None) -> float:
    """The loss of a step that has one token."""
    logp = behavior + float(np.log(rho)) if logp is None else logp
    group = with_advantage(group_of(rewards=[0.0], lengths=[1], behavior=[[logp - float(np.log(rho))]]), [advantage])
    return step_loss(algorithm, [group], [[logp]])[0]


def with_advantage(group: Group, values: Sequence[float]) -> Group:
    samples = [
        replace(s, advantage=np.full(len(s.tokens), a, np.float32)) for s, a in zip(group.samples, values, strict=True)
    ]
    return replace(group, samples=tuple(samples))


@pytest.mark.parametrize(
    ("advantage", "rho", "c", "loss"),
    [
        (1, 1.5, 10, -1.2),
        (1, 0.5, 10, -0.5),
        (-1, 1.5, 10, 1.5),
        (-1, 0.5, 10, 0.8),
        (-1, 15, 10, 10),
        (-1, 15, 3, 3),
        (-1, 3.5, 10, 3.5),
        (-1, 3.5, 3, 3),
    ],
)
def test_g6_dual_clip(advantage: float, rho: float, c: float, loss: float) -> None:
    assert one_token(GRPO(dual_clip=float(c)), advantage, rho) == pytest.approx(loss, abs=1e-5)


def test_v1_gspo() -> None:
    logp = [-1.0 + d for d in (0.1, -0.2, 0.3)]
    group = group_of(rewards=[0.0], lengths=[3], behavior=[[-1.0, -1.0, -1.0]])
    assert step_loss(GSPO(), [with_advantage(group, [1.0])], [logp])[0] == pytest.approx(-1.0004, abs=1e-5)
    value, gradient = step_loss(GSPO(), [with_advantage(group, [-1.0])], [logp])
    assert value == pytest.approx(1.068939, abs=1e-5)
    # sequence form: d/dlogp_t of exp(mean δ) is s/|o| at every token
    assert gradient[0] == pytest.approx([1.068939 / 3] * 3, abs=1e-5)


def test_v2_cispo() -> None:
    assert one_token(CISPO(clip_low=0.2, clip_high=0.2), 1.0, 1.5, logp=-0.7) == pytest.approx(0.84, abs=1e-5)
    assert one_token(CISPO(clip_high=4.0), 1.0, 1.5, logp=-0.7) == pytest.approx(1.05, abs=1e-5)


def test_v3_truncated_and_masked_importance_sampling() -> None:
    """log π_old/μ = [.2, 1, −.5]: with correction, π_old is the learner's own log-prob, so ρ = 1 and ℓ = −A·w."""
    logp = [-0.8, 0.0 - 1e-9, -1.5]
    group = with_advantage(group_of(rewards=[0.0], lengths=[3], behavior=[[-1.0, -1.0, -1.0]]), [1.0])

    def weights(**settings: Any) -> list[float]:
        _, gradient = step_loss(GRPO(norm="token", **settings), [group], [logp])
        return [-3 * g for g in gradient[0]]

    assert weights(correction="tis", correction_cap=2.0) == pytest.approx([1.221403, 2, 0.606531], abs=1e-5)
    assert weights(correction="tis", correction_level="sequence", correction_cap=2.0) == pytest.approx(
        [2] * 3, abs=1e-5
    )
    assert weights(correction="tis", correction_level="sequence", correction_cap=5.0) == pytest.approx(
        [2.013753] * 3, abs=1e-5
    )
    assert weights(correction="mis", correction_low=0.5, correction_cap=2.0) == pytest.approx(
        [1.221403, 0, 0.606531], abs=1e-5
    )


@pytest.mark.parametrize(("length", "punishment"), [(60, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1)])
def test_v4_overlong(length: int, punishment: float) -> None:
    algorithm = DAPO(overlong_max=100, overlong_buffer=20)
    group = algorithm.punished(group_of(rewards=[1.0], lengths=[length]))
    assert group.samples[0].reward == pytest.approx(1 + punishment)
    assert group.samples[0].scores["overlong"] == pytest.approx(punishment)


@pytest.mark.parametrize(
    ("norm", "expected"), [("token", 16 / 6), ("sequence", 2.5), ("sequence-sum", 8), ("constant", 1)]
)
def test_v5_aggregation(norm: str, expected: float) -> None:
    """Rows [1, 3] and [2, 2, 2, 6] as per-token losses; T = 8 for `constant` (TRL's form; verl's is N times it)."""
    rows = [[1.0, 3.0], [2.0, 2.0, 2.0, 6.0]]
    group = group_of(rewards=[0.0, 0.0], lengths=[2, 4], behavior=[[-1.0] * 2, [-1.0] * 4])
    samples = tuple(
        replace(s, advantage=np.concatenate([np.zeros(len(s.tokens) - len(r)), -np.array(r)]).astype(np.float32))
        for s, r in zip(group.samples, rows, strict=True)
    )
    value, _ = step_loss(GRPO(norm=norm, norm_length=8), [replace(group, samples=samples)], [[-1.0] * 2, [-1.0] * 4])
    assert value == pytest.approx(expected, abs=1e-5)


def test_rloo_is_reward_against_the_others() -> None:
    assert advantages(RLOO(), [1, 0, 0, 1]) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3], abs=1e-6)


def test_kl_estimators_k1_and_k8() -> None:
    """K1, K2, K8: values, expected gradients; k1 has none as a loss, k3's is the forward KL's."""
    from rlkd.core import kl

    z = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)).requires_grad_()
    teacher = torch.log(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))

    def expected_gradient(estimator: Any) -> list[float]:
        logp = torch.log_softmax(z, 0)
        pi = logp.exp().detach()
        return torch.autograd.grad((pi * estimator(logp, teacher)).sum(), z)[0].tolist()

    logp = torch.log_softmax(z, 0).detach()
    assert kl.k1(logp, teacher).tolist() == pytest.approx([0.916291, -0.510826, -0.405465], abs=1e-6)
    assert kl.k2(logp, teacher).tolist() == pytest.approx([0.419794, 0.130471, 0.082201], abs=1e-6)
    assert kl.k3(logp, teacher).tolist() == pytest.approx([0.316291, 0.155841, 0.094535], abs=1e-6)
    assert kl.k3_plus(logp, teacher).tolist() == pytest.approx(kl.k3(logp, teacher).tolist(), abs=1e-9)
    assert expected_gradient(kl.k1) == pytest.approx([0, 0, 0], abs=1e-9)
    reverse = [0.346243, -0.220389, -0.125854]
    assert expected_gradient(kl.k2) == pytest.approx(reverse, abs=1e-6)
    assert expected_gradient(kl.k3_plus) == pytest.approx(reverse, abs=1e-6)
    assert expected_gradient(kl.k3) == pytest.approx([0.3, -0.2, -0.1], abs=1e-6)
    in_advantage = expected_gradient(lambda p, q: -kl.as_advantage(p, q) * p)
    assert in_advantage == pytest.approx(reverse, abs=1e-6)
