"""KDRL: golden numbers K1–K5, K7, K8 of the design notes through the public path, equivalences, edge cases of §4.6."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms.gkd import GKD
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.opd import OPD
from rlkd.config.load import load
from rlkd.core import kl, teachers
from rlkd.core.batch import MicroBatch
from rlkd.core.distill import Term
from rlkd.core.errors import ConfigError, DataError
from rlkd.core.ports import Algorithm, PolicyOutput, Services
from rlkd.core.types import Group, Prompt, Signal
from rlkd.train.rollout import scored
from tests.distill_help import TableTeacher, answers, differs, likeliest, metrics_of, step, step_of, taught
from tests.fakes import FakePolicy, FakeVerify
from tests.test_algorithms import random_step
from tests.toys import prompt_of

PI, TEACHER = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
P = [[0.6, 0.4, 0.5], [0.3, 0.8]]
P_TEACHER = [[0.7, 0.5, 0.5], [0.6, 0.2]]
ROWS = [[10, 11, 12], [20, 21]]


def logs(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [np.log(row).tolist() for row in rows]


def constant(beta: float = 5e-3, **options: Any) -> KDRL:
    return KDRL(beta_0=beta, beta_decay=0.0, **options)


def two_rows(rewards: Sequence[float] = (1, 0)) -> Group:
    """The group of K3: on-policy, so that ρ = 1."""
    return taught(answers(ROWS, rewards, logs(P)), logs(P_TEACHER))


def random_taught(seed: int) -> tuple[list[Group], list[list[float]]]:
    """Random groups whose sampler is the policy, with a teacher's log-probs."""
    groups, logps = random_step(seed)
    rng, left, made = np.random.default_rng(seed + 1), list(logps), []
    for group in groups:
        samples = []
        for sample in group.samples:
            own = np.full(len(sample.tokens), np.nan, np.float32)
            own[3:] = left.pop(0)
            samples.append(replace(sample, behavior_logp=own))
        lengths = [s.answer_tokens for s in samples]
        group = replace(group, samples=tuple(samples))
        made.append(taught(group, [(-rng.exponential(1.0, n)).tolist() for n in lengths]))
    return made, logps


# --- golden numbers


@pytest.mark.parametrize(
    ("estimator", "values"),
    [
        ("k2", [0.419794, 0.130471, 0.082201]),
        ("k3", [0.316291, 0.155841, 0.094535]),
        ("k3+", [0.316291, 0.155841, 0.094535]),
    ],
)
def test_k1_values(estimator: Any, values: list[float]) -> None:
    """One token; its reward is 0, so that the loss is the KD term alone."""
    algorithm = constant(1.0, form="loss", kl=estimator)
    for token, value in enumerate(values):
        group = taught(answers([[token]], [0], [[np.log(PI[token])]]), [[np.log(TEACHER[token])]])
        assert step(algorithm, [group], [[np.log(PI[token])]])[0] == pytest.approx(value, abs=1e-6)
        delta = np.log(PI[token]) - np.log(TEACHER[token])
        assert step(constant(1.0, kl="k1"), [group], [[np.log(PI[token])]])[0] == pytest.approx(delta, abs=1e-6)


def expected_gradient(algorithm: Any) -> list[float]:
    """Gradient at the three logits of one token, in expectation over the sampled token."""
    logits, total = torch.tensor([PI]).log().requires_grad_(), torch.zeros(())
    for token in range(3):
        group = taught(answers([[token]], [0], [[np.log(PI[token])]]), [[np.log(TEACHER[token])]])
        group = likeliest(group, [np.log([TEACHER])], 3)
        total = total + PI[token] * step_of(algorithm, [group], [logits])[0]
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient[0].tolist()


REVERSE, FORWARD = [0.346243, -0.220389, -0.125854], [0.3, -0.2, -0.1]


@pytest.mark.parametrize(
    ("options", "gradient"),
    [
        ({"form": "loss", "kl": "k2"}, REVERSE),
        ({"form": "loss", "kl": "k3+"}, REVERSE),
        ({"form": "loss", "kl": "k3"}, FORWARD),
        ({"form": "loss", "kl": "topk", "top_k": 3}, REVERSE),
        ({"kl": "k1"}, REVERSE),
        ({"kl": "k2"}, REVERSE),
        ({"kl": "k3"}, FORWARD),
    ],
)
def test_k2_expected_gradients(options: dict[str, Any], gradient: list[float]) -> None:
    assert expected_gradient(constant(1.0, **options)) == pytest.approx(gradient, abs=2e-5)


K3_GRADIENT = [[-0.141575, -0.141644, -0.141421], [0.140728, 0.142807]]


def test_k3_joint_loss() -> None:
    policy = logs(P)
    reinforce, gradient = step(constant(0.0), [two_rows()], policy)
    assert reinforce == pytest.approx(-0.141421, abs=1e-6)
    assert metrics_of(constant(1.0, form="loss"), [two_rows()], policy)["kl_teacher"] > 0
    assert step(constant(1.0, form="loss"), [two_rows()], policy)[0] - reinforce == pytest.approx(0.247582, abs=1e-6)
    value, gradient = step(constant(form="loss"), [two_rows()], policy)
    assert value == pytest.approx(-0.140183, abs=1e-6)
    assert differs(gradient, K3_GRADIENT) < 1e-6
    assert step(constant(1e-3, form="loss"), [two_rows()], policy)[0] == pytest.approx(-0.141174, abs=1e-6)
    assert differs(step(constant(form="advantage"), [two_rows()], policy)[1], K3_GRADIENT) < 1e-6
    third = [[-0.141588, -0.141671, -0.141421], [0.140421, 0.142171]]
    assert differs(step(constant(form="loss", kl="k3"), [two_rows()], policy)[1], third) < 1e-6
    assert differs(step(constant(form="advantage", kl="k3"), [two_rows()], policy)[1], third) < 1e-6


def test_k4_masks_and_denominators() -> None:
    policy = logs(P)

    def joint(rewards: Sequence[float] = (1, 0), beta: float = 5e-3, **options: Any) -> float:
        return step(constant(beta, form="loss", **options), [two_rows(rewards)], policy)[0]

    reinforce = joint(beta=0.0)
    assert joint(beta=1.0, distill="wrong") - reinforce == pytest.approx(0.240227, abs=1e-6)
    assert joint(beta=1.0, distill="wrong", denominator="kept") - reinforce == pytest.approx(0.600566, abs=1e-6)
    assert joint(distill="wrong") == pytest.approx(-0.140220, abs=1e-6)
    assert joint(distill="failed_group") == pytest.approx(-0.141421, abs=1e-6)
    assert joint(distill="failed_group", denominator="kept") == pytest.approx(-0.141421, abs=1e-6)
    for distill in ("all", "wrong", "failed_group"):
        assert joint((0, 0), distill=distill) == pytest.approx(0.00123791, abs=1e-7)


@pytest.mark.parametrize(
    ("step_number", "beta"),
    [(0, 0.005), (1, 0.00495), (20, 0.004), (40, 0.003), (79, 0.00105), (80, 0.001), (280, 0.001)],
)
def test_k5_annealing(step_number: int, beta: float) -> None:
    assert KDRL().knobs(step_number, {})["beta"] == pytest.approx(beta, abs=1e-12)
    assert constant(0.005).knobs(step_number, {}) == {"beta": 0.005}


def test_k5_the_knob_is_what_the_loss_takes() -> None:
    late = step(KDRL(form="loss"), [two_rows()], logs(P), knobs=KDRL().knobs(80, {}))
    assert late[0] == pytest.approx(-0.141174, abs=1e-6)


@pytest.mark.parametrize("form", ["loss", "advantage"])
def test_k8_straight_through(form: Any) -> None:
    group = taught(answers([[0]], [0], [[np.log(0.5)]]), [[np.log(0.2)]])
    value, gradient = step(constant(1.0, form=form, kl="k3+"), [group], [[np.log(0.5)]])
    assert gradient[0] == pytest.approx([0.916291], abs=1e-6)
    assert value == pytest.approx(0.316291 if form == "loss" else 0.916291, abs=1e-6)


# --- K7: a teacher must change the gradient

DISTILLING: list[Any] = [
    constant(form="advantage", kl="k1"),
    constant(form="advantage", kl="k2"),
    constant(form="advantage", kl="k3"),
    constant(form="loss", kl="k2"),
    constant(form="loss", kl="k3"),
    constant(form="loss", kl="k3+"),
    constant(form="loss", kl="topk", top_k=4),
    constant(form="reward", standardize=False),  # two rewards, standardized, keep their order alone
    KDRL(distill="wrong", denominator="kept"),
    OPD(),
    OPD(reward_to_go=True),
    GKD(divergence="forward", top_k=4),
    GKD(divergence="reverse", top_k=4),
    GKD(divergence="jsd", top_k=4),
]


class K1AsLoss(KDRL):
    """The mistake: log π_θ − log π_T as a loss."""

    def term(self, pi: PolicyOutput, x: MicroBatch, here: torch.Tensor) -> Term:
        delta = kl.gap(pi.logp, x.required("teacher_logp")[0], here)
        nothing = torch.zeros_like(delta.detach())
        return Term(delta, nothing, nothing, nothing)


def by_two_teachers(algorithm: Any) -> tuple[list[Any], list[Any]]:
    """The gradient of the same step under two teachers."""
    made = torch.Generator().manual_seed(3)
    policy = [torch.randn(len(row), 8, generator=made) for row in ROWS]
    tokens = [[1, 2, 3], [4, 5]]
    behavior = [torch.log_softmax(p, -1)[range(len(t)), t].tolist() for p, t in zip(policy, tokens, strict=True)]
    found = []
    for seed in (1, 2):
        made.manual_seed(seed)
        full = [torch.log_softmax(2 * torch.randn(len(t), 8, generator=made), -1).numpy() for t in tokens]
        rows = [f[range(len(t)), t].tolist() for f, t in zip(full, tokens, strict=True)]
        group = likeliest(taught(answers(tokens, [1, 0], behavior), rows), full, 4)
        found.append(step(algorithm, [group], policy)[1])
    return found[0], found[1]


@pytest.mark.parametrize("algorithm", DISTILLING, ids=lambda a: f"{a.name}-{DISTILLING.index(a)}")
def test_k7_the_teacher_changes_the_gradient(algorithm: Any) -> None:
    assert algorithm.problems() == []
    a, b = by_two_teachers(algorithm)
    assert differs(a, b) > 1e-5


def test_k7_k1_as_a_loss_would_be_caught() -> None:
    """Negative control: its gradient is the same whatever the teacher says."""
    algorithm = K1AsLoss(beta_0=5e-3, beta_decay=0.0, form="loss")
    a, b = by_two_teachers(algorithm)
    assert differs(a, b) == 0.0
    _, gradient = step(algorithm, [two_rows()], logs(P))
    assert differs(gradient, [[-0.140421] * 3, [0.142421] * 2]) < 1e-6


def test_k1_as_a_loss_is_refused_with_its_reason() -> None:
    (problem,) = KDRL(form="loss", kl="k1").problems()
    assert problem.startswith("kl=k1")
    assert "does not depend on π_T" in problem


# --- equivalences


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    norm=st.sampled_from(["token", "sequence", "sequence-sum", "constant"]),
    standardize=st.booleans(),
    dual_clip=st.sampled_from([None, 3.0]),
    correction=st.sampled_from(["none", "tis", "mis"]),
    entropy=st.sampled_from([0.0, 0.01]),
    form=st.sampled_from(["advantage", "loss"]),
)
def test_without_beta_it_is_grpo(seed: int, form: Any, **options: Any) -> None:
    """β = 0 by the setting (no teacher at all), and by the knob."""
    groups, logps = random_step(seed)
    wanted, gradient = step(GRPO(norm_length=8, **options), groups, logps)
    algorithm = KDRL(norm_length=8, beta_0=0.0, beta_min=0.0, clip=True, form=form, **options)
    assert algorithm.needs == frozenset()
    value, found = step(algorithm, groups, logps)
    assert value == wanted
    assert differs(found, gradient) == 0.0
    scored_groups = [taught(g, [[-1.0] * s.answer_tokens for s in g.samples]) for g in groups]
    value, found = step(replace(algorithm, beta_0=0.1), scored_groups, logps, knobs={"beta": 0.0})
    assert value == pytest.approx(wanted, abs=1e-6)
    assert differs(found, gradient) < 1e-7


def test_with_beta_it_is_not_grpo() -> None:
    """Negative control of the test above."""
    groups, logps = random_taught(5)
    grpo = step(GRPO(norm="token"), groups, logps)[1]
    assert differs(step(constant(0.1, clip=True), groups, logps)[1], grpo) > 1e-4


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    estimator=st.sampled_from(["k2", "k3", "k3+"]),
    norm=st.sampled_from(["token", "sequence", "sequence-sum", "constant"]),
    distill=st.sampled_from(["all", "wrong", "failed_group"]),
    denominator=st.sampled_from(["all", "kept"]),
    correction=st.sampled_from(["none", "tis"]),
    on_policy=st.booleans(),
)
def test_the_advantage_form_is_the_loss_form(seed: int, estimator: Any, on_policy: bool, **options: Any) -> None:
    """Also for samples of an older policy, where importance weighs both."""
    groups, logps = random_taught(seed)
    if not on_policy:
        rng = np.random.default_rng(seed)
        logps = [[v + float(rng.normal(0, 0.3)) for v in p] for p in logps]
    options |= {"norm_length": 8, "kl": estimator}
    a = step(constant(0.1, form="advantage", **options), groups, logps)[1]
    b = step(constant(0.1, form="loss", **options), groups, logps)[1]
    largest = max(float(np.abs(np.asarray(g)).max()) for g in b)
    assert differs(a, b) < 1e-6 * max(1.0, largest)


def test_both_forms_weigh_the_teachers_pull_by_the_ratio() -> None:
    """For samples of an older policy: ρ multiplies it as it multiplies Â."""
    rho = 1.5
    group = taught(answers([[7]], [0], [[-1.0 - np.log(rho)]]), [[-2.0]])
    assert step(constant(1.0), [group], [[-1.0]])[1][0] == pytest.approx([rho * 1.0], abs=1e-5)
    assert step(constant(1.0, form="loss"), [group], [[-1.0]])[1][0] == pytest.approx([rho * 1.0], abs=1e-5)


@pytest.mark.parametrize("norm", ["token", "sequence", "sequence-sum", "constant"])
@pytest.mark.parametrize("distill", ["all", "wrong"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 3), max_tokens=st.sampled_from([14, 30]))
def test_kept_tokens_are_those_of_the_step(norm: Any, distill: Any, seed: int, ranks: int, max_tokens: int) -> None:
    """The denominator `kept` depends on no micro-batch."""
    groups, logps = random_taught(seed)
    algorithm = constant(0.3, form="loss", distill=distill, denominator="kept", norm=norm, norm_length=8)
    value, gradient = step(algorithm, groups, logps)
    split_value, split = step(algorithm, groups, logps, ranks=ranks, max_tokens=max_tokens)
    assert split_value == pytest.approx(value, abs=5e-6)
    assert differs(split, gradient) < 5e-6


def test_kept_is_counted_over_all_groups_of_the_step() -> None:
    """Wrong are one sample of the first group and all of the second: the mean is over the tokens of both groups."""
    other = taught(answers([[30], [40, 41]], (0, 0), [[-1.0], [-1.0, -0.2]]), [[-0.4], [-2.0, -0.7]])
    groups, policy = [two_rows(), other], [*logs(P), [-1.0], [-1.0, -0.2]]
    delta = np.array([np.log(0.3 / 0.6), np.log(0.8 / 0.2), -0.6, 1.0, 0.5])
    algorithm = constant(1.0, form="loss", distill="wrong", denominator="kept")
    joint, reinforce = (step(a, groups, policy)[0] for a in (algorithm, constant(0.0)))
    assert joint - reinforce == pytest.approx((0.5 * delta**2).mean(), abs=1e-6)
    k3 = np.exp(-delta) - 1 + delta
    assert metrics_of(algorithm, groups, policy)["kl_teacher"] == pytest.approx(k3.mean(), abs=1e-6)


def test_kept_is_all_when_everything_is_kept() -> None:
    groups, logps = random_taught(9)
    for norm in ("token", "sequence", "sequence-sum", "constant"):
        options: dict[str, Any] = {"form": "loss", "norm": norm, "norm_length": 8}
        a = step(constant(0.3, **options), groups, logps)[1]
        b = step(constant(0.3, denominator="kept", **options), groups, logps)[1]
        assert differs(a, b) < 1e-7


def test_reward_form() -> None:
    """r′ = r + β R against the group, by hand: R of the two rows is log 1.4583 and log ½."""
    ratio = [np.log(0.7 / 0.6) + np.log(0.5 / 0.4), np.log(0.6 / 0.3) + np.log(0.2 / 0.8)]
    for shaping, bonus in (("sum", ratio), ("mean", [ratio[0] / 3, ratio[1] / 2])):
        algorithm = constant(0.5, form="reward", shaping=shaping, standardize=False)
        assert algorithm.problems() == []
        group = algorithm.credit(two_rows())
        shaped = np.array([1, 0]) + 0.5 * np.array(bonus)
        centered = shaped - shaped.mean()
        assert [float(s.advantage[-1]) for s in group.samples] == pytest.approx(centered.tolist(), abs=1e-6)
        assert [s.scores["teacher"] for s in group.samples] == pytest.approx([0.5 * b for b in bonus], abs=1e-6)
        assert group.rewards.tolist() == [1, 0]  # what verifiers said stays
    _, gradient = step(constant(0.5, form="reward", shaping="mean", standardize=False), [two_rows()], logs(P))
    assert differs(gradient, [[-centered[0] / 5] * 3, [-centered[1] / 5] * 2]) < 1e-6


def test_reward_form_leaves_out_what_the_teacher_does_not_know() -> None:
    algorithm = constant(0.5, form="reward", standardize=False)
    scores = [s.scores["teacher"] for s in algorithm.credit(silent(silent(two_rows(), 0, 1), 1, 0)).samples]
    assert scores == pytest.approx([0.5 * np.log(0.7 / 0.6), 0.0], abs=1e-6)
    masked = replace(algorithm, distill="wrong").credit(two_rows())
    assert masked.samples[0].scores["teacher"] == 0.0
    assert masked.samples[1].scores["teacher"] != 0.0


# --- edge cases


def teacher_part(algorithm: KDRL, group: Group, policy: Sequence[Any]) -> list[Any]:
    """The gradient less that of the reward."""
    _, joint = step(algorithm, [group], policy)
    _, alone = step(replace(algorithm, beta_0=0.0), [group], policy)
    return [(np.array(a) - np.array(b)).tolist() for a, b in zip(joint, alone, strict=True)]


@pytest.mark.parametrize(
    ("rewards", "distill", "acts"),
    [
        ((1, 1), "all", True),
        ((0, 0), "all", True),
        ((1, 1), "wrong", False),
        ((0, 0), "wrong", True),
        ((1, 1), "failed_group", False),
        ((0, 0), "failed_group", True),
        ((1, 0), "failed_group", False),
    ],
)
def test_groups_without_contrast_keep_the_teacher(rewards: Any, distill: Any, acts: bool) -> None:
    group = two_rows(rewards)
    algorithm = constant(distill=distill)
    assert len(algorithm.credit(group).samples) == 2
    assert (max(np.abs(np.concatenate(teacher_part(algorithm, group, logs(P))))) > 0) == acts


def test_only_wrong_samples_are_distilled_and_scored() -> None:
    group, algorithm = two_rows((1, 0)), constant(distill="wrong")
    assert algorithm.wants(group, "t").tolist() == [False, True]
    part = teacher_part(algorithm, group, logs(P))
    assert part[0] == [0, 0, 0]
    assert 0 not in part[1]
    assert constant(distill="wrong", success=1.5).wants(group, "t").tolist() == [True, True]


def silent(group: Group, sample: int, answer_from: int, value: float = np.nan) -> Group:
    """The group whose teacher says nothing (or `value`) of a sample's answer from there on."""
    samples = list(group.samples)
    rows = samples[sample].teacher_logp.copy()  # type: ignore[union-attr]
    rows[:, len(samples[sample].tokens) - samples[sample].answer_tokens + answer_from :] = value
    samples[sample] = replace(samples[sample], teacher_logp=rows)
    return replace(group, samples=tuple(samples))


@pytest.mark.parametrize("form", ["advantage", "loss"])
@pytest.mark.parametrize("answer_from", [0, 1, 2], ids=["whole-row", "beyond-its-context", "other-end-token"])
def test_what_the_teacher_does_not_know_has_no_kd_term(form: Any, answer_from: int) -> None:
    algorithm = constant(0.5, form=form)
    group = silent(two_rows(), 0, answer_from)
    part = teacher_part(algorithm, group, logs(P))
    whole = teacher_part(algorithm, two_rows(), logs(P))
    assert part[0][:answer_from] == whole[0][:answer_from]
    assert part[0][answer_from:] == [0] * (3 - answer_from)
    assert part[1] == whole[1]
    metrics = metrics_of(algorithm, [group], logs(P))
    assert metrics["teacher_missing"] == pytest.approx((3 - answer_from) / 5)
    assert metrics["teacher_scored"] == pytest.approx((2 + answer_from) / 5)
    assert metrics_of(algorithm, [two_rows()], logs(P))["teacher_missing"] == 0


def test_zeros_for_an_unknown_token_would_be_caught() -> None:
    """Negative control of the test above: 0 is a log-prob, and pulls."""
    part = teacher_part(constant(0.5), silent(two_rows(), 0, 2, value=0.0), logs(P))
    assert part[0][2] != 0


def test_kl_teacher_is_the_mean_over_scored_tokens() -> None:
    delta = np.array([np.log(0.3 / 0.6), np.log(0.8 / 0.2)])
    k3 = float((np.exp(-delta) - 1 + delta).mean())
    metrics = metrics_of(constant(distill="wrong"), [two_rows()], logs(P))
    assert metrics["kl_teacher"] == pytest.approx(k3, abs=1e-5)
    nothing = metrics_of(constant(distill="wrong"), [two_rows((1, 1))], logs(P))
    assert np.isnan(nothing["kl_teacher"])  # not known, not 0
    assert nothing["teacher_scored"] == 0


@pytest.mark.parametrize("form", ["advantage", "loss"])
@pytest.mark.parametrize("logp", [-np.inf, -60.0])
def test_a_forbidden_token_pulls_by_the_bound_and_no_more(form: Any, logp: float) -> None:
    algorithm = constant(0.1, form=form)
    group = silent(two_rows(), 0, 2, value=logp)
    part = teacher_part(algorithm, group, logs(P))
    assert part[0][2] == pytest.approx(0.1 * 20 / 5, rel=1e-4)
    assert metrics_of(algorithm, [group], logs(P))["teacher_clamped"] == pytest.approx(1 / 5)


def test_a_truncated_answer_keeps_the_teacher_and_its_reward() -> None:
    from rlkd.core.types import Finish

    group = two_rows((0, 0))
    cut = replace(group, samples=tuple(replace(s, finish=Finish.LENGTH) for s in group.samples))
    assert teacher_part(constant(), cut, logs(P)) == teacher_part(constant(), group, logs(P))


def test_without_a_clip_nothing_is_cut() -> None:
    group = taught(answers([[1], [2]], [1, 0], [[-2.0], [-1.0]]), [[-1.0], [-1.0]])
    assert differs(step(constant(0.0), [group], [[-1.0], [-1.0]])[1], [[-0.707106 * np.e / 2], [0.707106 / 2]]) < 1e-5
    assert step(constant(0.0, clip=True), [group], [[-1.0], [-1.0]])[1][0] == [0]


def test_without_a_teacher_it_is_an_error() -> None:
    groups, logps = random_step(4)
    for algorithm in (KDRL(), OPD()):
        with pytest.raises(ValueError, match="teacher_logp"):
            step(algorithm, groups, logps)
    for algorithm in (KDRL(form="loss", kl="topk"), GKD()):
        with pytest.raises(ValueError, match="teacher_topk"):
            step(algorithm, groups, logps)


def test_a_recipe_without_a_teacher_is_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    grpo = Path(__file__).parents[1] / "configs" / "grpo-tiny.yaml"
    for name in ("kdrl", "opd", "gkd"):
        recipe.write_text(f"defaults: [{grpo.with_suffix('')}]\nalgorithm: {{name: {name}}}\n")
        with pytest.raises(ConfigError, match="asks for a teacher"):
            load(recipe)
    recipe.write_text(f"defaults: [{grpo.with_suffix('')}]\nalgorithm: {{name: kdrl, beta_0: 0, beta_decay: 0}}\n")
    assert load(recipe).algorithm.needs == frozenset()  # β = 0 is GRPO and needs none


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.1}, "beta"),
        ({"beta_0": -1.0}, "beta_0"),
        ({"beta_min": 0.1}, "beta_min"),
        ({"dual_clip": 3.0}, "dual_clip"),
        ({"kl": "topk"}, "kl"),
        ({"kl": "topk", "form": "loss", "top_k": 0}, "top_k"),
        ({"kl": "topk", "form": "loss", "combine": "mean"}, "combine"),
        ({"form": "reward"}, "beta_decay"),
        ({"form": "reward", "beta_decay": 0.0, "kl": "k3"}, "kl"),
        ({"form": "reward", "beta_decay": 0.0, "denominator": "kept"}, "denominator"),
        ({"combine": "domain"}, "combine"),
        ({"domains": {"math": "a"}}, "domains"),
        ({"combine": "mean", "teacher": "a"}, "teacher"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], named: str) -> None:
    problems = KDRL(**options).problems()
    assert any(re.match(rf"{named}\b", p) for p in problems), problems


def test_the_defaults_contradict_nothing() -> None:
    for algorithm in (KDRL(), KDRL(form="loss"), KDRL(form="loss", kl="topk")):
        assert algorithm.problems() == []
        assert isinstance(algorithm, Algorithm)
    assert KDRL().needs == {Signal.TEACHER}
    assert KDRL(kl="topk", form="loss").needs == {Signal.TEACHER_TOPK}


# --- several teachers, asked through the port


def ask(**models: TableTeacher) -> Services:
    return Services(FakePolicy(), FakeVerify(), teachers=models)


def asked(algorithm: Any, group: Group, services: Services) -> Group:
    return asyncio.run(scored(group, services, algorithm))


def bare(prompt: Prompt | None = None, rewards: Sequence[float] = (1, 0)) -> Group:
    return answers(ROWS, rewards, logs(P), prompt)


def row_of(teacher: TableTeacher, tokens: Sequence[int]) -> list[float]:
    return teacher.of(np.array(tokens)).tolist()


def test_only_what_has_weight_is_asked() -> None:
    teacher = TableTeacher()
    group = asked(constant(distill="wrong"), bare(), ask(t=teacher))
    assert [t[3:] for t in teacher.asked] == [tuple(ROWS[1])]
    assert np.isnan(group.samples[0].teacher_logp).all()
    assert group.samples[1].teacher_logp[0, 3:].tolist() == pytest.approx(row_of(teacher, ROWS[1]))  # type: ignore
    teacher.asked.clear()
    asked(constant(distill="failed_group"), bare(), ask(t=teacher))
    assert teacher.asked == []
    topk = asked(constant(distill="wrong", kl="topk", form="loss", top_k=4), bare(), ask(t=teacher))
    assert [t[3:] for t in teacher.asked] == [tuple(ROWS[1])]
    assert np.isnan(topk.samples[0].teacher_topk.logp).all()  # type: ignore[union-attr]


def test_one_of_several_teachers_by_name() -> None:
    a, b = TableTeacher(), TableTeacher(offset=3)
    algorithm = constant(teacher="b")
    group = algorithm.credit(asked(algorithm, bare(), ask(a=a, b=b)))
    assert a.asked == []
    assert group.samples[0].teacher_logp[0, 3:].tolist() == pytest.approx(row_of(b, ROWS[0]))  # type: ignore
    assert algorithm.teacher_names == {"b"}


def test_several_teachers_where_one_should_speak_is_an_error() -> None:
    algorithm = constant()
    group = asked(algorithm, bare(), ask(a=TableTeacher(), b=TableTeacher(offset=2)))
    with pytest.raises(ConfigError, match="2 teachers scored one sample") as error:
        algorithm.credit(group)
    assert "algorithm.teacher" in str(error.value)


@pytest.mark.parametrize("form", ["advantage", "loss"])
def test_the_mean_of_teachers_has_the_mean_of_their_gradients(form: Any) -> None:
    a, b = logs(P_TEACHER), [[-0.3, -2.0, -0.9], [-1.5, -0.1]]
    group = answers(ROWS, [1, 0], logs(P))
    alone = [teacher_part(constant(0.5, form=form), taught(group, t), logs(P)) for t in (a, b)]
    both = teacher_part(constant(0.5, form=form, combine="mean"), taught(group, a, b), logs(P))
    for i in range(2):
        assert both[i] == pytest.approx((np.array(alone[0][i]) + np.array(alone[1][i])) / 2, abs=1e-6)


def test_domains() -> None:
    adds, writes = TableTeacher(), TableTeacher(offset=2)
    by_source = constant(combine="domain", domains={"sums": "adds", "*": "writes"})
    by_column = constant(combine="domain", domain_key="kind", domains={"a": "adds", "w": "writes"})
    assert by_source.problems() == by_column.problems() == []
    for algorithm, prompt, expected in (
        (by_source, replace(prompt_of(), source="sums"), adds),
        (by_source, replace(prompt_of(), source="essays"), writes),
        (by_column, replace(prompt_of(), metadata={"kind": "w"}), writes),
    ):
        adds.asked.clear()
        writes.asked.clear()
        group = algorithm.credit(asked(algorithm, bare(prompt), ask(adds=adds, writes=writes)))
        assert len(expected.asked) == 2
        assert len(adds.asked) + len(writes.asked) == 2
        assert group.samples[1].teacher_logp[:, 3:].tolist() == pytest.approx(  # type: ignore[index]
            np.array([row_of(expected, ROWS[1])])
        )
    with pytest.raises(DataError, match="domain `x`") as error:
        asked(by_column, bare(replace(prompt_of(), metadata={"kind": "x"})), ask(adds=adds, writes=writes))
    assert "algorithm.domains" in str(error.value)
    assert by_source.teacher_names == {"adds", "writes"}


def test_domains_work_with_likeliest_tokens() -> None:
    adds, writes = TableTeacher(), TableTeacher()
    algorithm = constant(
        combine="domain", domains={"sums": "adds", "*": "writes"}, kl="topk", form="loss", top_k=4, beta=0.5
    )
    prompt = replace(prompt_of(), source="sums")
    policy = [torch.zeros(3, 30), torch.zeros(2, 30)]
    group = asked(algorithm, bare(prompt), ask(adds=adds, writes=writes))
    assert writes.asked == []
    assert max(np.abs(np.concatenate([np.ravel(p) for p in teacher_part(algorithm, group, policy)]))) > 0


def test_confidence() -> None:
    """Weights are a softmax over teachers of their mean log-prob of the sample: here −1 and −2."""
    rows = np.array([[np.nan, -0.5, -1.5], [np.nan, -1.0, -3.0]], np.float32)
    written = np.array([False, True, True])
    weight = 1 / (1 + np.exp(-1.0))
    expected = weight * rows[0, 1:] + (1 - weight) * rows[1, 1:]
    found = teachers.confident(rows, written)
    assert np.isnan(found[0])
    assert found[1:].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    sample = replace(answers([[5, 6]], [0], [[-1.0, -1.0]], prompt_of(1)).samples[0], teacher_logp=rows)
    one = constant(combine="confidence").combined(sample)
    assert one.teacher_logp is not None
    assert one.teacher_logp.shape == (1, 3)
    assert one.teacher_logp[0, 1:].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_confidence_where_teachers_know_different_tokens() -> None:
    nan = np.nan
    written = np.ones(3, bool)
    # the second knows only the first token: they are compared there, and the first speaks alone elsewhere
    rows = np.array([[-1.0, -9.0, -9.0], [-1.0, nan, nan]], np.float32)
    assert teachers.confident(rows, written).tolist() == pytest.approx([-1.0, -9.0, -9.0])
    # one that was not asked has no weight
    assert teachers.confident(np.array([[-1.0, -2.0, nan], [nan] * 3], np.float32), written)[:2].tolist() == [-1, -2]
    assert np.isnan(teachers.confident(np.full((2, 3), nan, np.float32), written)).all()
    three = np.array([[-1.0, -1.0, -1.0], [-9.0, -9.0, -9.0], [nan] * 3], np.float32)
    assert teachers.confident(three, written).tolist() == pytest.approx([-1.0] * 3, abs=5e-3)
    # nothing in common: all weigh the same
    apart = np.array([[-1.0, nan, nan], [nan, -2.0, nan]], np.float32)
    assert teachers.confident(apart, written)[:2].tolist() == [-1.0, -2.0]
    # −∞ of one teacher is much, and not everything
    mean = teachers.mean(np.array([[-np.inf, -1.0], [-2.0, nan]], np.float32))
    assert mean.tolist() == pytest.approx([-51.0, -1.0])
    assert np.isfinite(teachers.confident(np.array([[-np.inf] * 3, [-1.0] * 3], np.float32), written)).all()


@pytest.mark.parametrize("name", ["kdrl", "opd", "gkd"])
def test_the_fragment_of_the_page_loads(name: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "algorithms" / f"{name}.md").read_text(encoding="utf-8")
    fragments = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert fragments
    for fragment in fragments:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"defaults: [{root / 'configs' / 'grpo-tiny'}]\n{fragment}")
        assert load(recipe).algorithm.name == name
