"""What a token weighs: importance of a KL's term, what is rejected or masked, and TRL's names for what is here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.luffy import LUFFY
from rlkd.algorithms.opd import OPD
from rlkd.core import kl
from rlkd.core.batch import pack
from rlkd.core.mismatch import Reject
from rlkd.core.types import Finish, Group
from tests.distill_help import answers, metrics_of, step, taught

PI, OLD, OTHER = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.2, 0.5, 0.3]
REVERSE, FORWARD = [0.346243, -0.220389, -0.125854], [0.3, -0.2, -0.1]  # K2: the gradients of the two KLs


# --- a KL to another model, of samples of an older policy


def at_token(algorithm: Any, token: int, behavior: float) -> list[float]:
    """The gradient on the logits of PI of a step of this one token, which earned nothing."""
    group = taught(answers([[token]], [0], [[behavior]]), [[np.log(OTHER[token])]])
    reference = np.array([np.nan] * 3 + [np.log(OTHER[token])], np.float32)
    samples = tuple(replace(s, reference_logp=reference) for s in group.samples)
    gradient: list[float] = step(algorithm, [replace(group, samples=samples)], [np.log([PI])])[1][0][0]
    return gradient


def expected(algorithm: Any, sampler: Sequence[float], said: Sequence[float]) -> list[float]:
    """The exact mean of the gradient over tokens of `sampler`, whose log-probs are said to be those of `said`."""
    each = [np.array(at_token(algorithm, t, float(np.log(said[t])))) for t in range(3)]
    return list(np.sum([p * g for p, g in zip(sampler, each, strict=True)], axis=0))


def constant(**options: Any) -> KDRL:
    return KDRL(form="loss", beta_0=1.0, beta_decay=0.0, **options)


KLS = [
    (GRPO(beta=1.0, kl="k2"), REVERSE),
    (GRPO(beta=1.0, kl="k3"), FORWARD),
    (GRPO(beta=1.0, kl="k3+"), REVERSE),
    (GRPO(beta=1.0, kl="k2", correction="tis", correction_cap=10.0), REVERSE),
    (constant(kl="k2"), REVERSE),
    (constant(kl="k3"), FORWARD),
    (constant(kl="k3+"), REVERSE),
    (constant(kl="k2", correction="tis", correction_cap=10.0), REVERSE),
]


@pytest.mark.parametrize(("algorithm", "gradient"), KLS, ids=lambda a: f"{a.name}-{a.kl}" if hasattr(a, "kl") else "")
@pytest.mark.parametrize("sampler", [PI, OLD], ids=["on-policy", "older"])
def test_the_gradient_of_a_kl_is_unbiased_whoever_sampled(algorithm: Any, gradient: Any, sampler: Any) -> None:
    assert expected(algorithm, sampler, sampler) == pytest.approx(gradient, abs=1e-5)


@pytest.mark.parametrize(("algorithm", "gradient"), KLS, ids=lambda a: f"{a.name}-{a.kl}" if hasattr(a, "kl") else "")
def test_without_importance_it_is_another(algorithm: Any, gradient: Any) -> None:
    """Negative control: an older policy's tokens as if they were the policy's own."""
    found = expected(algorithm, OLD, PI)
    assert max(abs(a - b) for a, b in zip(found, gradient, strict=True)) > 0.05


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_on_policy_it_is_the_estimator_token_by_token(estimator: Any) -> None:
    for token in range(3):
        logits = torch.log(torch.tensor(PI)).requires_grad_()
        own = torch.log_softmax(logits, -1)[token]
        (plain,) = torch.autograd.grad(kl.estimate(estimator, own, torch.log(torch.tensor(OTHER[token]))), logits)
        found = at_token(GRPO(beta=1.0, kl=estimator), token, float(np.log(PI[token])))
        assert found == pytest.approx(plain.tolist(), abs=1e-6)


def test_with_the_gradient_of_the_ratio_k2_would_be_no_kls() -> None:
    """Why the ratio is detached: E[ρ·k2] has the gradient of E_π[k2], which is neither KL's."""
    logits = torch.log(torch.tensor(PI)).requires_grad_()
    own = torch.log_softmax(logits, -1)
    ratio = torch.exp(own) / torch.tensor(OLD)
    mean = (torch.tensor(OLD) * ratio * kl.k2(own, torch.log(torch.tensor(OTHER)))).sum()
    (found,) = torch.autograd.grad(mean, logits)
    for gradient in (REVERSE, FORWARD):
        assert float((found - torch.tensor(gradient)).abs().max()) > 0.05


# --- what is rejected

LOG_RATIOS = [[0.2, -0.1], [1.0, 0.5]]  # log π_θ − log μ of two answers


def rows(finish: Sequence[Finish] = (Finish.STOP, Finish.STOP), rewards: Sequence[float] = (1, 1)) -> Group:
    behavior = [[-1.0 - r for r in row] for row in LOG_RATIOS]
    group = answers([[10, 11], [20, 21]], rewards, behavior)
    samples = [replace(s, finish=f) for s, f in zip(group.samples, finish, strict=True)]
    return replace(group, samples=tuple(samples))


class Plain(GRPO):
    """Â is the reward, and there is no clip: the gradient is −w·ρ·r/M."""

    def compared(self, rewards: np.ndarray) -> np.ndarray:
        return rewards

    def surrogate(self, rho: Any, a: Any, pi: Any, x: Any) -> Any:
        return -a * rho


def weights(**options: Any) -> list[list[float]]:
    """w of each token, by its gradient."""
    _, gradient = step(Plain(norm="token", **options), [rows()], [[-1.0] * 2] * 2)
    plain = [np.exp(r) if options.get("correction", "none") == "none" else np.ones(2) for r in LOG_RATIOS]
    return [(-4 * np.array(g) / p).round(5).tolist() for g, p in zip(gradient, plain, strict=True)]


@pytest.mark.parametrize(
    ("by", "over", "first", "second"),
    [
        ("k1", "mean", 0.05, 0.75),
        ("k1", "sum", 0.1, 1.5),
        ("k1", "max", 0.2, 1.0),
        ("k2", "mean", 0.0125, 0.3125),
        ("k2", "sum", 0.025, 0.625),
        ("k2", "max", 0.02, 0.5),
        ("k3", "mean", 0.013120, 0.433502),
        ("k3", "sum", 0.026240, 0.867003),
        ("k3", "max", 0.021403, 0.718282),
    ],
)
def test_answers_are_rejected_above_the_bound(by: Any, over: Any, first: float, second: float) -> None:
    """By hand: k1 = −ℓ, k2 = ½ℓ², k3 = e^ℓ − 1 − ℓ. The denominator stays all four tokens."""
    for above, expected_weights in (
        (first - 1e-4, [0, 0]),
        (first + 1e-4, [1, 0]),
        (second - 1e-4, [1, 0]),
        (second + 1e-4, [1, 1]),
    ):
        found = weights(reject=Reject(by, over, above))
        assert found == [[w, w] for w in expected_weights]


@pytest.mark.parametrize(("by", "each"), [("k1", [0.1, 0.2, 0.5]), ("k2", [0.005, 0.02, 0.125])])
def test_tokens_are_rejected_one_by_one(by: Any, each: list[float]) -> None:
    assert weights(reject=Reject(by, "token", each[0] + 1e-4)) == [[0, 1], [0, 0]]
    assert weights(reject=Reject(by, "token", each[1] + 1e-4)) == [[1, 1], [0, 0]]
    assert weights(reject=Reject(by, "token", each[2] + 1e-4)) == [[1, 1], [0, 1]]


def test_what_is_left_keeps_the_weight_of_its_correction() -> None:
    found = weights(correction="tis", correction_cap=1.1, reject=Reject("k1", "token", 0.6))
    assert found == [[1.1, pytest.approx(np.exp(-0.1), abs=1e-4)], [0, 1.1]]


def test_the_share_of_rejected_tokens_is_shown() -> None:
    shown = metrics_of(GRPO(reject=Reject("k1", "token", 0.15)), [rows()], [[-1.0] * 2] * 2)
    assert shown["rejected"] == pytest.approx(0.75)
    assert "rejected" not in metrics_of(GRPO(), [rows()], [[-1.0] * 2] * 2)


def test_rejected_tokens_have_no_kl_either() -> None:
    reference = np.array([np.nan] * 3 + [-2.0] * 2, np.float32)
    group = replace(rows(), samples=tuple(replace(s, reference_logp=reference) for s in rows(rewards=(0, 0)).samples))
    _, gradient = step(Plain(beta=1.0, kl="k2", reject=Reject("k1", "mean", 0.1)), [group], [[-1.0] * 2] * 2)
    assert min(gradient[0]) > 0
    assert gradient[1] == [0, 0]


# --- answers that were cut


@pytest.mark.faults("F46")
def test_a_cut_answer_counts_in_the_mean_and_has_no_loss() -> None:
    """Rewards 1 (cut) and 0: Â = ±½ as without the mask, and the other row weighs what it weighs without it."""
    group = rows((Finish.LENGTH, Finish.STOP), (1, 0))
    options: dict[str, Any] = {"standardize": False, "norm": "token", "correction": "tis", "correction_cap": 9.0}
    _, plain = step(GRPO(**options), [group], [[-1.0] * 2] * 2)
    _, masked = step(GRPO(mask_truncated=True, **options), [group], [[-1.0] * 2] * 2)
    assert plain[0] == pytest.approx([-0.5 * np.exp(0.2) / 4, -0.5 * np.exp(-0.1) / 4], abs=1e-6)
    assert masked[0] == [0, 0]
    assert masked[1] == plain[1] == pytest.approx([0.5 * np.e / 4, 0.5 * np.exp(0.5) / 4], abs=1e-6)
    shown = metrics_of(GRPO(mask_truncated=True), [group], [[-1.0] * 2] * 2)
    assert shown["truncated_masked"] == pytest.approx(0.5)


@pytest.mark.parametrize("finish", [Finish.STOP, Finish.ABORTED])
def test_only_the_limit_cuts(finish: Finish) -> None:
    group = rows((finish, Finish.STOP), (1, 0))
    assert step(GRPO(mask_truncated=True), [group], [[-1.0] * 2] * 2) == step(GRPO(), [group], [[-1.0] * 2] * 2)


# --- TRL's two-sided clip (`delta`) is the dual clip


@pytest.mark.parametrize("delta", [1.5, 3.0])
def test_the_dual_clip_is_trls_delta(delta: float) -> None:
    """TRL: −min(min(ρ, Δ)·A, clip(ρ)·A) with Δ > 1 + ε. Its value and its gradient at every ρ, for both signs of A."""
    for rewards in ((1, 0), (0, 1)):
        for rho in (0.1, 0.7, 1.0, 1.15, 1.3, 1.6, 2.9, 3.1, 20.0):
            group = answers([[10], [20]], rewards, [[-1.0 - np.log(rho)], [-1.0 - np.log(rho)]])
            algorithm = GRPO(standardize=False, dual_clip=delta)
            logp = torch.full((2,), -1.0, requires_grad=True)
            a = torch.tensor(rewards) - 0.5
            ratio = torch.exp(logp + 1.0 + np.log(rho))
            trl = -torch.minimum(ratio.clamp(max=delta) * a, ratio.clamp(0.8, 1.2) * a).mean()
            trl.backward()  # type: ignore[no-untyped-call]
            value, gradient = step(algorithm, [group], [[-1.0], [-1.0]])
            assert value == pytest.approx(trl.item(), abs=1e-5)
            assert logp.grad is not None
            assert [g for row in gradient for g in row] == pytest.approx(logp.grad.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (GRPO(reject=Reject(above=0.1)), "reject.above=0.1 needs by"),
        (GRPO(reject=Reject(by="k1")), "reject.above=None"),
        (GRPO(reject=Reject(by="k3", above=-1.0)), "reject.above=-1.0"),
        (GRPO(correction_cap=-1.0), "correction_cap=-1.0"),
        (KDRL(mask_truncated=True), "mask_truncated"),
        (OPD(mask_truncated=True), "mask_truncated"),
        (LUFFY(norm_length=8, mask_truncated=True, drop_truncated_advantage=True), "take one"),
    ],
)
def test_contradictions_are_named(algorithm: Any, said: str) -> None:
    (problem,) = algorithm.problems()
    assert said in problem


def test_what_is_unknown_is_rejected() -> None:
    (turn,) = pack([rows()], 1, 100)
    for over in ("token", "mean", "sum", "max"):
        unknown = torch.full(turn[0].tokens.shape, torch.nan)
        kept = Reject("k2", over, 1.0).keeps(unknown, turn[0])
        assert kept.tolist() == [True, True, True, False, False] * 2
