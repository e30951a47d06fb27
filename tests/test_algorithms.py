"""What must hold for every algorithm, whatever it is."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms.cispo import CISPO
from rlkd.algorithms.dapo import DAPO
from rlkd.algorithms.dr_grpo import DrGRPO
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.gspo import GSPO
from rlkd.algorithms.reinforce_pp import ReinforcePP
from rlkd.algorithms.rloo import RLOO
from rlkd.core.batch import pack
from rlkd.core.mismatch import Reject
from rlkd.core.ports import Algorithm
from rlkd.core.types import Finish, Group, Origin
from tests.toys import group_of, output_of, prompt_of, step_loss

ALGORITHMS: list[Any] = [
    GRPO(),
    GRPO(norm="token", beta=0.1, kl="k2", entropy=0.01),
    GRPO(beta=0.1, kl="k1", dual_clip=3.0),
    GRPO(correction="tis"),
    GRPO(correction="mis", correction_level="sequence"),
    GRPO(norm="token", beta=0.1, kl="k3+", mask_truncated=True),
    GRPO(correction="tis", reject=Reject(by="k3", over="mean", above=0.02)),
    GRPO(norm="token", reject=Reject(by="k1", over="token", above=0.2)),
    GSPO(reject=Reject(by="k2", over="max", above=0.05), mask_truncated=True),
    RLOO(reject=Reject(by="k1", over="sum", above=0.5)),
    DrGRPO(norm_length=16),
    DAPO(dynamic_sampling=False, overlong_max=8, overlong_buffer=4),
    RLOO(beta=0.05),
    ReinforcePP(beta=0.05),
    ReinforcePP(baseline=False),
    GSPO(),
    CISPO(),
]
names = [f"{a.name}-{i}" for i, a in enumerate(ALGORITHMS)]


def random_step(seed: int, groups: int = 3, size: int = 4) -> tuple[list[Group], list[list[float]]]:
    """Groups with rewards, behaviour and reference log-probs, and the policy's log-probs of every answer token."""
    rng = np.random.default_rng(seed)
    made, logps = [], []
    for g in range(groups):
        lengths = rng.integers(1, 8, size).tolist()
        logps += [(-rng.exponential(1.0, n)).tolist() for n in lengths]
        behavior = [np.minimum(np.array(p) + rng.normal(0, 0.2, len(p)), 0).tolist() for p in logps[-size:]]
        group = group_of(rng.integers(0, 2, size).astype(float).tolist(), lengths, behavior, prompt_of(3, f"p{g}"))
        samples = [
            replace(s, reference_logp=np.where(s.origin == Origin.POLICY, -rng.exponential(1.0, len(s.tokens)), np.nan)
                    .astype(np.float32), finish=Finish.LENGTH if i == g else s.finish,
                    tokens=np.concatenate([s.tokens[:3], s.tokens[3:] + 100 * (g * size + i)])
                    .astype(np.int32))
            for i, s in enumerate(group.samples)
        ]  # fmt: skip
        made.append(replace(group, samples=tuple(samples)))
    return made, logps


def credited(algorithm: Any, groups: Sequence[Group]) -> list[Group]:
    return list(algorithm.credit_step([algorithm.credit(g) for g in groups]))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_is_an_algorithm(algorithm: Any) -> None:
    assert isinstance(algorithm, Algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 4), max_tokens=st.sampled_from([14, 20, 40, 1000]))
def test_gradient_does_not_depend_on_the_split(algorithm: Any, seed: int, ranks: int, max_tokens: int) -> None:
    """Micro-batch size, number of ranks (also ranks with nothing to do) and order of samples."""
    groups, logps = random_step(seed)
    groups = credited(algorithm, groups)
    value, gradient = step_loss(algorithm, groups, logps)
    split_value, split_gradient = step_loss(algorithm, groups, logps, ranks, max_tokens)
    assert split_value == pytest.approx(value, abs=2e-6)
    for a, b in zip(gradient, split_gradient, strict=True):
        assert b == pytest.approx(a, abs=2e-6)
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    shuffled = [groups[i] for i in order]
    _, again = step_loss(algorithm, shuffled, [p for i in order for p in logps[4 * i : 4 * i + 4]])
    for j, i in enumerate(order):
        for a, b in zip(gradient[4 * i : 4 * i + 4], again[4 * j : 4 * j + 4], strict=True):
            assert b == pytest.approx(a, abs=2e-6)


def test_a_mean_per_micro_batch_would_be_caught() -> None:
    """Negative control of the test above: with each micro-batch's own counts the gradient does depend on the split."""
    from rlkd.core.batch import Totals

    groups, logps = random_step(1)
    algorithm = GRPO(norm="token")
    groups = credited(algorithm, groups)

    def wrong(max_tokens: int) -> float:
        total, start = 0.0, 0
        for turn in pack(groups, 1, max_tokens):
            for x in turn:
                own = {u: int(((x.origin & u) != 0).sum()) for u in x.totals.tokens}
                x = replace(x, totals=Totals(x.samples, own, x.totals.sequences))
                count = own[int(Origin.POLICY)]
                flat = torch.tensor([v for p in logps for v in p])[start : start + count]
                start += count
                total += float(algorithm.loss(output_of(flat, x), x, {}).value)
        return total

    assert wrong(1000) != pytest.approx(wrong(14), abs=1e-3)


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not a.beta and not a.entropy], ids=lambda a: a.name)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_give_no_gradient(algorithm: Any, reward: float) -> None:
    groups, logps = random_step(3)
    same = [replace(g, samples=tuple(replace(s, reward=reward) for s in g.samples)) for g in groups]
    if isinstance(algorithm, DAPO):
        algorithm = replace(algorithm, overlong_max=None)
    _, gradient = step_loss(algorithm, credited(algorithm, same), logps)
    assert max(abs(v) for p in gradient for v in p) == 0.0


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.needs], ids=lambda a: f"{a.name}-{a.kl}")
def test_the_reference_changes_the_gradient(algorithm: Any) -> None:
    """A KL that does not depend on its reference is no KL (k1 as a loss would fail here)."""
    groups, logps = random_step(4)
    moved = [
        replace(g, samples=tuple(replace(s, reference_logp=s.reference_logp - np.float32(0.5) * (i % 2) *
                                         np.arange(len(s.tokens), dtype=np.float32)) for i, s in enumerate(g.samples)))
        for g in groups
    ]  # fmt: skip
    _, a = step_loss(algorithm, credited(algorithm, groups), logps)
    _, b = step_loss(algorithm, credited(algorithm, moved), logps)
    assert max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)) > 1e-4


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.needs], ids=lambda a: f"{a.name}-{a.kl}")
def test_a_missing_reference_is_an_error(algorithm: Any) -> None:
    groups, logps = random_step(4)
    without = [replace(g, samples=tuple(replace(s, reference_logp=None) for s in g.samples)) for g in groups]
    with pytest.raises(ValueError, match="reference_logp"):
        step_loss(algorithm, credited(algorithm, without), logps)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_teacher_tokens_do_not_make_nan(algorithm: Any) -> None:
    """behavior_logp is NaN where nobody sampled: loss and gradient stay finite."""
    groups, logps = random_step(5)
    first = groups[0].samples[0]
    origin = np.where(first.origin == Origin.POLICY, Origin.TEACHER, first.origin).astype(np.uint8)
    guided = replace(
        first,
        origin=origin,
        behavior_logp=np.full(len(first.tokens), np.nan, np.float32),
        reference_logp=np.full(len(first.tokens), -1.0, np.float32),
    )
    groups[0] = replace(groups[0], samples=(guided, *groups[0].samples[1:]))
    value, gradient = step_loss(algorithm, credited(algorithm, groups), logps)
    assert np.isfinite(value)
    assert all(np.isfinite(v) for p in gradient for v in p)


def test_dapo_turns_away_groups_without_contrast() -> None:
    right = group_of([1.0, 1.0], [2, 2])
    mixed = group_of([1.0, 0.0], [2, 2])
    assert DAPO().credit(right).samples == ()
    assert len(DAPO().credit(mixed).samples) == 2
    assert len(DAPO(dynamic_sampling=False).credit(right).samples) == 2


def test_reinforce_pp_normalises_over_the_step() -> None:
    groups, _ = random_step(6)
    algorithm = ReinforcePP(baseline=False)
    values = np.concatenate(
        [s.advantage[s.origin == Origin.POLICY] for g in credited(algorithm, groups) for s in g.samples]
    )
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.std() == pytest.approx(1, abs=1e-5)


def test_contradictions_are_named() -> None:
    from rlkd.rollout import Sampled

    assert "norm_length" in DrGRPO().problems()[0]
    assert "samples=1" in GRPO(rollout=Sampled(samples=1)).problems()[0]
    assert ReinforcePP(baseline=False, rollout=Sampled(samples=1)).problems() == []
    assert "dual_clip" in GRPO(dual_clip=0.5).problems()[0]
    assert GRPO(beta=-0.1).problems() == ["beta=-0.1 must not be negative"]
    assert "overlong_buffer" in DAPO(overlong_max=8).problems()[0]
    assert "dual_clip" in CISPO(dual_clip=3.0).problems()[0]
    assert "dual_clip" in RLOO(dual_clip=3.0).problems()[0]
