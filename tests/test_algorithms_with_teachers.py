"""What must hold for every algorithm that learns from others: from a teacher's log-probs, or from what one wrote."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms import TABLE, algorithm
from rlkd.algorithms.ampo import AMPO
from rlkd.algorithms.dpo import DPO
from rlkd.algorithms.gkd import GKD
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.luffy import LUFFY
from rlkd.algorithms.opd import OPD
from rlkd.algorithms.rsft import RSFT
from rlkd.algorithms.sft import SFT
from rlkd.algorithms.thinktuning import ThinkTuning
from rlkd.core.mismatch import Reject
from rlkd.core.ports import Algorithm
from rlkd.core.types import Group, Origin, Signal, TopK
from tests.distill_help import credited, differs, step, step_of
from tests.toys import group_of, prompt_of

VOCABULARY = 12
ALGORITHMS: list[Any] = [
    KDRL(),
    KDRL(form="loss", kl="k2", clip=True),
    KDRL(form="loss", kl="k3+", distill="wrong", denominator="kept"),
    KDRL(form="loss", kl="topk", top_k=3, distill="failed_group"),
    KDRL(form="reward", beta_decay=0.0, beta_0=0.05),
    KDRL(combine="mean", correction="tis"),
    KDRL(form="loss", correction="tis", reject=Reject(by="k1", over="token", above=2.0)),
    OPD(),
    OPD(reward_to_go=True),
    GKD(top_k=3),
    GKD(top_k=3, divergence="reverse", norm="token"),
    LUFFY(norm_length=8),
    LUFFY(norm_length=8, advantage="split", shape="sqrt"),
    LUFFY(norm_length=8, sft_weight=0.5),
    AMPO(norm_length=8),
    AMPO(norm_length=8, mask_truncated=True, reject=Reject(by="k1", over="token", above=1.0)),
    ThinkTuning(),
    SFT(),
    SFT(norm="sequence"),
    RSFT(),
    DPO(),
    DPO(ipo=True, length_normalised=True),
]
names = [f"{a.name}-{i}" for i, a in enumerate(ALGORITHMS)]
taught = [a for a in ALGORITHMS if a.needs & {Signal.TEACHER, Signal.TEACHER_TOPK}]


def random_step(seed: int, groups: int = 3, size: int = 4) -> tuple[list[Group], list[Any]]:
    """Groups with every signal, the last sample of each written by a teacher; the policy's logits of all answers."""
    rng = np.random.default_rng(seed)
    made, logits = [], []
    for g in range(groups):
        lengths = rng.integers(2, 8, size).tolist()
        group = group_of(rng.integers(0, 2, size).astype(float).tolist(), lengths, None, prompt_of(3, f"p{g}"))
        samples = []
        for i, (sample, length) in enumerate(zip(group.samples, lengths, strict=True)):
            tokens = np.concatenate([[0, g, i], rng.integers(0, VOCABULARY, length)]).astype(np.int32)
            written = np.arange(len(tokens)) >= 3
            origin = np.where(written, Origin.TEACHER if i == size - 1 else Origin.POLICY, Origin.PROMPT)
            own = -rng.exponential(1.0, len(tokens)).astype(np.float32)
            teacher = np.where(written, -rng.exponential(1.0, (1, len(tokens))), np.nan).astype(np.float32)
            ids = np.array([rng.permutation(VOCABULARY)[:3] for _ in tokens], np.int32)
            top = np.where(written[:, None], np.log(rng.dirichlet(np.ones(4), len(tokens))[:, :3]), np.nan)
            samples.append(
                replace(
                    sample,
                    tokens=tokens,
                    origin=origin.astype(np.uint8),
                    behavior_logp=np.where(origin == Origin.POLICY, own, np.nan).astype(np.float32),
                    reference_logp=np.where(written, own - 0.1, np.nan).astype(np.float32),
                    teacher_logp=teacher,
                    teacher_topk=TopK(ids, top.astype(np.float32)),
                )
            )
            logits.append(rng.normal(0, 1, (length, VOCABULARY)))
        made.append(replace(group, samples=tuple(samples)))
    return made, logits


def test_every_algorithm_of_the_table_is_in_a_property_test() -> None:
    from tests.test_algorithms import ALGORITHMS as PLAIN

    assert {a.name for a in [*ALGORITHMS, *PLAIN]} == set(TABLE)
    assert all(isinstance(a, algorithm(a.name)) for a in ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_is_an_algorithm_without_problems(algorithm: Any) -> None:
    assert isinstance(algorithm, Algorithm)
    assert algorithm.problems() == []


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 4), max_tokens=st.sampled_from([45, 60, 1000]))
def test_gradient_does_not_depend_on_the_split(algorithm: Any, seed: int, ranks: int, max_tokens: int) -> None:
    """Micro-batch size, number of ranks (also ranks with nothing to do) and order of groups."""
    groups, logits = random_step(seed)
    if not any(g.samples for g in credited(algorithm, groups)):
        return  # a step without samples is never taken
    groups = [g for g in groups if algorithm.credit(g).samples]
    value, gradient = step(algorithm, *_of(groups, logits, seed))
    split_value, split = step(algorithm, *_of(groups, logits, seed), ranks=ranks, max_tokens=max_tokens)
    assert split_value == pytest.approx(value, rel=2e-6, abs=5e-6)
    assert differs(gradient, split) < 5e-6
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    shuffled = [groups[i] for i in order]
    _, again = step(algorithm, *_of(shuffled, logits, seed))
    assert differs([gradient[4 * i + j] for i in order for j in range(4)], again) < 5e-6


def _of(groups: Sequence[Group], logits: Sequence[Any], seed: int) -> tuple[Sequence[Group], list[Any]]:
    """The groups, and the policy's logits of their samples."""
    every, _ = random_step(seed)
    number = {tuple(s.tokens.tolist()): i for i, s in enumerate(s for g in every for s in g.samples)}
    return groups, [logits[number[tuple(s.tokens.tolist())]] for g in groups for s in g.samples]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_every_needed_signal_is_missed(algorithm: Any) -> None:
    """An algorithm that goes on without what it needs would be silently another one."""
    groups, logits = random_step(1)
    fields = {Signal.TEACHER: "teacher_logp", Signal.TEACHER_TOPK: "teacher_topk", Signal.REFERENCE: "reference_logp"}
    for signal in algorithm.needs & set(fields):
        without = [replace(g, samples=tuple(replace(s, **{fields[signal]: None}) for s in g.samples)) for g in groups]
        with pytest.raises(ValueError, match=fields[signal]):
            step(algorithm, without, logits)


def without_teacher(group: Group) -> Group:
    """As it is scored when `on_unavailable: skip_kd` has nobody to ask."""

    def one(sample: Any) -> Any:
        top = replace(sample.teacher_topk, logp=np.full_like(sample.teacher_topk.logp, np.nan))
        return replace(sample, teacher_logp=np.full_like(sample.teacher_logp, np.nan), teacher_topk=top)

    return replace(group, samples=tuple(one(s) for s in group.samples))


@pytest.mark.faults("F7")
@pytest.mark.parametrize("algorithm", taught, ids=lambda a: f"{a.name}-{names[ALGORITHMS.index(a)][-2:]}")
@pytest.mark.parametrize("away", [1, 3])
def test_groups_without_their_teacher_have_the_gradient_of_the_rewards_alone(algorithm: Any, away: int) -> None:
    groups, logits = random_step(5)
    groups[0] = replace(groups[0], samples=tuple(replace(s, reward=0.0) for s in groups[0].samples))  # all distil it
    scored = [without_teacher(g) if i < away else g for i, g in enumerate(groups)]
    value, gradient = step(algorithm, scored, logits)
    assert np.isfinite(value)
    alone = replace(algorithm, beta_0=0.0, beta_min=0.0, beta_decay=0.0) if isinstance(algorithm, KDRL) else None
    _, expected = step(alone, groups, logits) if alone else (0.0, [np.zeros_like(g) for g in gradient])
    assert differs(gradient[: 4 * away], expected[: 4 * away]) < 1e-6
    _, taught_gradient = step(algorithm, groups, logits)
    if away < 3 and getattr(algorithm, "denominator", "all") == "all":  # `kept` re-weights what is left
        assert differs(gradient[4 * away :], taught_gradient[4 * away :]) < 1e-6
    assert differs(gradient[: 4 * away], taught_gradient[: 4 * away]) > 1e-6


@pytest.mark.parametrize("algorithm", taught, ids=lambda a: f"{a.name}-{names[ALGORITHMS.index(a)][-2:]}")
def test_the_teacher_changes_the_gradient(algorithm: Any) -> None:
    """A distillation whose gradient does not depend on its teacher is none (K7)."""
    groups, logits = random_step(2)
    rng = np.random.default_rng(0)

    def moved(sample: Any) -> Any:
        rows = sample.teacher_logp - rng.exponential(1.0, sample.teacher_logp.shape).astype(np.float32)
        top = sample.teacher_topk
        return replace(sample, teacher_logp=rows, teacher_topk=TopK(top.ids, top.logp[:, ::-1].copy()))

    other = [replace(g, samples=tuple(moved(s) for s in g.samples)) for g in groups]
    same = [replace(g, samples=tuple(replace(s, reward=0.0) for s in g.samples)) for g in groups]
    other = [replace(g, samples=tuple(replace(s, reward=0.0) for s in g.samples)) for g in other]
    _, a = step(algorithm, same, logits)
    _, b = step(algorithm, other, logits)
    assert differs(a, b) > 1e-6


@pytest.mark.parametrize("algorithm", taught, ids=lambda a: f"{a.name}-{names[ALGORITHMS.index(a)][-2:]}")
def test_what_a_teacher_does_not_say_is_no_nan(algorithm: Any) -> None:
    """NaN in a teacher's row: no term there, a finite gradient, and not the gradient of a teacher that says 0."""
    groups, logits = random_step(3)

    def silent(sample: Any, value: float) -> Any:
        rows, top = sample.teacher_logp.copy(), sample.teacher_topk.logp.copy()
        rows[:, 4], top[4] = value, value
        return replace(sample, reward=0.0, teacher_logp=rows, teacher_topk=TopK(sample.teacher_topk.ids, top))

    results = []
    for value in (np.nan, -1e-3 if Signal.TEACHER in algorithm.needs else -3.0):
        changed = [replace(g, samples=tuple(silent(s, value) for s in g.samples)) for g in groups]
        policy = [torch.tensor(p, dtype=torch.float32, requires_grad=True) for p in logits]
        total, metrics = step_of(algorithm, changed, policy)
        total.backward()
        found = [np.zeros(1) if p.grad is None else p.grad.numpy() for p in policy]
        assert all(np.isfinite(g).all() for g in found)
        results.append(found)
    assert metrics
    assert any(a.shape != b.shape or np.abs(a - b).max() > 1e-7 for a, b in zip(*results, strict=True))
