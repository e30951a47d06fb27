"""GKD: divergences on the teacher's likeliest tokens, and where its answers come from."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms.gkd import GKD
from rlkd.core.divergence import between
from rlkd.core.ports import Algorithm, Services
from rlkd.core.types import Demonstration, Group, Origin, Prompt, Signal
from rlkd.rollout.mixed import Mixed
from tests.distill_help import answers, differs, likeliest, metrics_of, origins, step, step_of
from tests.fakes import FakePolicy, FakeVerify
from tests.toys import prompt_of

VOCABULARY = 8
ROWS = [[1, 2, 3], [4, 5], [6], [7, 0, 1, 2]]


def group_and_policy(seed: int = 0, k: int = 4) -> tuple[Group, list[torch.Tensor], list[torch.Tensor]]:
    """Answers with a teacher's k likeliest tokens, the policy's logits, the teacher's log-probs of all tokens."""
    made = torch.Generator().manual_seed(seed)
    policy = [torch.randn(len(r), VOCABULARY, generator=made) for r in ROWS]
    teacher = [torch.log_softmax(2 * torch.randn(len(r), VOCABULARY, generator=made), -1) for r in ROWS]
    group = answers(ROWS, [1, 0, 0, 1], [[-1.0] * len(r) for r in ROWS])
    return likeliest(group, [t.numpy() for t in teacher], k), policy, teacher


@pytest.mark.parametrize(
    ("divergence", "value", "gradient"),
    [("reverse", 0.223805, [0.346243, -0.220389, -0.125854]), ("forward", 0.193794, [0.3, -0.2, -0.1])],
)
def test_golden(divergence: Any, value: float, gradient: list[float]) -> None:
    """One place, all three tokens: the KL itself, whichever token was sampled."""
    for token in range(3):
        group = likeliest(answers([[token]], [0], [[-1.0]]), [np.log([[0.2, 0.5, 0.3]])], 3)
        found, slope = step(GKD(divergence=divergence, top_k=3), [group], [np.log([[0.5, 0.3, 0.2]])])
        assert found == pytest.approx(value, abs=1e-5)
        assert slope[0][0] == pytest.approx(gradient, abs=1e-4)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_with_all_tokens_it_is_the_divergence_of_the_paper(divergence: Any) -> None:
    """Eq. 2: the mean over an answer's tokens, then over answers."""
    group, policy, teacher = group_and_policy(k=VOCABULARY)
    rows = [between(divergence, torch.log_softmax(p, -1), t, 0.3).mean() for p, t in zip(policy, teacher, strict=True)]
    found, _ = step(GKD(divergence=divergence, jsd_beta=0.3, top_k=VOCABULARY), [group], policy)
    assert found == pytest.approx(float(torch.stack(rows).mean()), abs=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("norm", ["token", "sequence", "sequence-sum", "constant"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), ranks=st.integers(1, 3), max_tokens=st.sampled_from([8, 12]))
def test_gradient_does_not_depend_on_the_split(
    divergence: Any, norm: Any, seed: int, ranks: int, max_tokens: int
) -> None:
    group, policy, _ = group_and_policy(seed)
    algorithm = GKD(divergence=divergence, top_k=4, norm=norm, norm_length=8)
    value, gradient = step(algorithm, [group], policy)
    split_value, split = step(algorithm, [group], policy, ranks=ranks, max_tokens=max_tokens)
    assert split_value == pytest.approx(value, abs=2e-6)
    assert differs(split, gradient) < 2e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_training_brings_student_to_teacher(divergence: Any) -> None:
    """200 steps on the top 4 of 8 tokens: the tail's tokens stay as they were, and the whole KL at least halves."""
    group, policy, teacher = group_and_policy(2)
    leaves = [p.clone().requires_grad_() for p in policy]

    def whole() -> float:
        pairs = zip(leaves, teacher, strict=True)
        return float(sum(between("forward", torch.log_softmax(p.detach(), -1), t).sum() for p, t in pairs))

    before = whole()
    optimizer = torch.optim.Adam(leaves, 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        step_of(GKD(divergence=divergence, top_k=4), [group], leaves)[0].backward()
        optimizer.step()
    assert whole() < before / 2
    assert metrics_of(GKD(top_k=4), [group], [p.detach() for p in leaves])["divergence"] < 0.01


def test_demonstrations_are_trained_on() -> None:
    """The loss covers what a teacher wrote as well as what the policy wrote, and rewards have no part in it."""
    group, policy, _ = group_and_policy()
    samples = []
    for i, sample in enumerate(group.samples):
        written = sample.origin != Origin.PROMPT
        origin = np.where(written, Origin.TEACHER if i % 2 else Origin.POLICY, Origin.PROMPT).astype(np.uint8)
        behavior = np.where(origin == Origin.POLICY, sample.behavior_logp, np.nan).astype(np.float32)
        samples.append(replace(sample, origin=origin, behavior_logp=behavior, reward=float(i)))
    mixed = replace(group, samples=tuple(samples))
    a, b = step(GKD(top_k=4), [group], policy), step(GKD(top_k=4), [mixed], policy)
    assert a[0] == b[0]
    assert differs(a[1], b[1]) == 0.0
    assert all(np.abs(g).max() > 0 for g in a[1])


def test_what_the_teacher_does_not_know_adds_nothing() -> None:
    group, policy, _ = group_and_policy()
    first = group.samples[0]
    assert first.teacher_topk is not None
    logp = first.teacher_topk.logp.copy()
    logp[-2:] = np.nan
    silent = replace(first, teacher_topk=replace(first.teacher_topk, logp=logp))
    cut = replace(group, samples=(silent, *group.samples[1:]))
    _, gradient = step(GKD(top_k=4), [cut], policy)
    _, whole = step(GKD(top_k=4), [group], policy)
    assert gradient[0][0] == whole[0][0]
    assert np.abs(gradient[0][1:]).max() == 0
    assert differs(gradient[1:], whole[1:]) == 0.0
    assert metrics_of(GKD(top_k=4), [cut], policy)["teacher_missing"] == pytest.approx(2 / 10)


def test_contradictions_are_named() -> None:
    assert GKD().problems() == []
    assert isinstance(GKD(), Algorithm)
    assert GKD().needs == {Signal.TEACHER_TOPK}
    for options, named in (
        ({"jsd_beta": 1.0}, "jsd_beta"),
        ({"top_k": 0}, "top_k"),
        ({"norm": "constant"}, "norm"),
        ({"combine": "mean"}, "combine"),
        ({"rollout": Mixed(on_policy=1.5)}, "rollout.on_policy"),
        ({"rollout": Mixed(samples=0)}, "rollout.samples"),
    ):
        (problem,) = GKD(**options).problems()  # type: ignore[arg-type]
        assert problem.startswith(named)


# --- the rollout


def with_answers(n: int, seed: int = 0) -> Prompt:
    made = tuple(Demonstration(f"t{i}", np.array([50 + i, 2], np.int32)) for i in range(n))
    return replace(prompt_of(), demonstrations=made, seed=seed)


def rolled(rollout: Mixed, prompt: Prompt, **services: Any) -> Group:
    return asyncio.run(rollout(prompt, Services(FakePolicy(), FakeVerify(), **services), {}))


def of_policy(group: Group) -> bool:
    (kind,) = {tuple(origins(s)) for s in group.samples}
    assert kind in {(Origin.PROMPT, Origin.POLICY), (Origin.PROMPT, Origin.TEACHER)}
    return kind == (Origin.PROMPT, Origin.POLICY)


def test_all_or_nothing() -> None:
    for seed in range(20):
        assert of_policy(rolled(Mixed(3, on_policy=1.0), with_answers(2, seed)))
        group = rolled(Mixed(3, on_policy=0.0), with_answers(2, seed))
        assert not of_policy(group)
        assert [s.tokens[-2] for s in group.samples] == [50, 51]
        assert all(np.isnan(s.behavior_logp).all() for s in group.samples)


def test_the_share_is_lambda_and_depends_on_the_seed_alone() -> None:
    kinds = [of_policy(rolled(Mixed(2, on_policy=0.7), with_answers(1, seed))) for seed in range(400)]
    assert np.mean(kinds) == pytest.approx(0.7, abs=0.07)
    again = [of_policy(rolled(Mixed(2, on_policy=0.7), with_answers(1, seed))) for seed in range(400)]
    assert kinds == again


def test_at_most_samples_demonstrations() -> None:
    group = rolled(Mixed(2, on_policy=0.0), with_answers(5, seed=3))
    assert len({int(s.tokens[-2]) for s in group.samples}) == 2


def test_no_demonstration_is_said_and_the_policy_answers() -> None:
    said: list[tuple[str, str]] = []
    group = rolled(Mixed(3, on_policy=0.0), with_answers(0), report=lambda kind, text: said.append((kind, text)))
    assert of_policy(group)
    assert len(group.samples) == 3
    assert [kind for kind, _ in said] == ["no_demonstration"]


def test_live_traces_come_before_stored_ones() -> None:
    async def traces(_: Prompt) -> tuple[Demonstration, ...]:
        return (Demonstration("live", np.array([99, 2], np.int32)),)

    group = rolled(Mixed(3, on_policy=0.0), with_answers(2), traces=traces)
    assert [int(s.tokens[-2]) for s in group.samples] == [99]
