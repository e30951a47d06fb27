"""Online DPO: which pair, what loss, and that nothing depends on packing."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rlkd.algorithms.dpo import DPO
from rlkd.core.batch import pack
from rlkd.core.ports import Algorithm, Guidance, Services
from rlkd.core.types import Demonstration, Finish, Group, Origin, Signal
from rlkd.guidance.shown import Shown
from rlkd.rollout import Sampled
from tests.fakes import FakePolicy, FakeVerify
from tests.toys import group_of, output_of, prompt_of, step_loss


def with_reference(group: Group, reference: Sequence[float]) -> Group:
    """Each answer's tokens get its number as reference log-prob; prompts get NaN."""
    samples = tuple(
        replace(s, reference_logp=np.where(s.origin == Origin.PROMPT, np.nan, r).astype(np.float32))
        for s, r in zip(group.samples, reference, strict=True)
    )
    return replace(group, samples=samples)


def pairs(count: int = 3) -> tuple[list[Group], list[list[float]]]:
    """Groups of one chosen and one rejected answer of different lengths, and the policy's log-probs."""
    rng = np.random.default_rng(4)
    groups, logps = [], []
    for g in range(count):
        lengths = [2 + g, 4]
        group = with_reference(group_of([1.0, 0.0], lengths, prompt=prompt_of(2, f"p{g}")), [-1.0, -1.5])
        samples = tuple(
            replace(s, tokens=(s.tokens + np.where(s.origin == Origin.PROMPT, 0, 100 * (2 * g + i))).astype(np.int32))
            for i, s in enumerate(group.samples)
        )
        groups.append(DPO().credit(replace(group, samples=samples)))
        logps += [(-rng.exponential(1.0, n)).tolist() for n in lengths]
    return groups, logps


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_pair(algorithm: DPO, chosen: Sequence[float], rejected: Sequence[float]) -> tuple[float, list[list[float]]]:
    """Reference log-probs are −1 at every token."""
    group = with_reference(group_of([1.0, 0.0], [len(chosen), len(rejected)]), [-1.0, -1.0])
    return step_loss(algorithm, [algorithm.credit(group)], [chosen, rejected])


def test_at_the_reference_the_loss_is_log_2() -> None:
    value, gradient = one_pair(DPO(beta=0.3), [-1.0, -1.0], [-1.0])
    assert value == pytest.approx(math.log(2))
    assert gradient[0] == pytest.approx([-0.15, -0.15])  # −β·σ(−βh)
    assert gradient[1] == pytest.approx([0.15])


def test_sigmoid_loss_and_its_gradient() -> None:
    h = (0.5 + 0.2) - (-0.4)
    value, gradient = one_pair(DPO(beta=0.5), [-0.5, -0.8], [-1.4])
    assert value == pytest.approx(-math.log(sigmoid(0.5 * h)), abs=1e-6)
    assert gradient[0] == pytest.approx([-0.5 * sigmoid(-0.5 * h)] * 2, abs=1e-6)
    assert gradient[1] == pytest.approx([0.5 * sigmoid(-0.5 * h)], abs=1e-6)


def test_label_smoothing() -> None:
    h, e = 1.1, 0.1
    value, _ = one_pair(DPO(beta=0.5, label_smoothing=e), [-0.5, -0.8], [-1.4])
    expected = -(1 - e) * math.log(sigmoid(0.5 * h)) - e * math.log(sigmoid(-0.5 * h))
    assert value == pytest.approx(expected, abs=1e-6)


def test_ipo() -> None:
    value, gradient = one_pair(DPO(beta=0.5, ipo=True), [-0.5, -0.8], [-1.4])
    assert value == pytest.approx((1.1 - 1.0) ** 2, abs=1e-6)
    assert gradient[1] == pytest.approx([-2 * 0.1], abs=1e-6)  # beyond 1/(2β) it pulls back


def test_length_normalised() -> None:
    value, _ = one_pair(DPO(beta=1.0, length_normalised=True), [-0.5, -0.8], [-1.4])
    assert value == pytest.approx(-math.log(sigmoid(0.35 + 0.4)), abs=1e-6)


@pytest.mark.parametrize("algorithm", [DPO(), DPO(ipo=True), DPO(length_normalised=True, label_smoothing=0.2)])
def test_does_not_depend_on_packing(algorithm: DPO) -> None:
    groups, logps = pairs()
    value, gradient = step_loss(algorithm, groups, logps)
    assert value > 0
    for ranks, max_tokens in ((1, 11), (2, 11), (4, 25)):
        again, parts = step_loss(algorithm, groups, logps, ranks, max_tokens)
        assert again == pytest.approx(value, rel=1e-6)
        for a, b in zip(gradient, parts, strict=True):
            assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


@dataclass(frozen=True)
class Torn(DPO):
    whole_groups: ClassVar[bool] = False


def test_a_pair_that_is_torn_apart_would_be_caught() -> None:
    """Negative control: without whole_groups the two answers land in different micro-batches."""
    groups, logps = pairs()
    assert step_loss(Torn(), groups, logps)[0] == pytest.approx(step_loss(DPO(), groups, logps)[0], abs=1e-6)
    assert step_loss(Torn(), groups, logps, 1, 6)[0] != pytest.approx(step_loss(DPO(), groups, logps)[0], abs=1e-3)


def test_metrics_are_means_over_pairs() -> None:
    groups, logps = pairs(2)
    found: dict[str, float] = {}
    by_token = dict(_by_first_token(groups, logps))
    for turn in pack(groups, 1, 10, whole_groups=True):
        for x in turn:
            firsts = [int(x.tokens[(x.segment == i) & (x.origin != Origin.PROMPT)][0]) for i in range(x.samples)]
            logp = torch.tensor([v for f in firsts for v in by_token[f]])
            for name, share in DPO().loss(output_of(logp, x), x, {}).metrics.items():
                found[name] = found.get(name, 0.0) + float(share)
    ratios = [sum(logps[i]) - len(logps[i]) * r for i, r in zip(range(4), (-1.0, -1.5, -1.0, -1.5), strict=True)]
    margins = [ratios[0] - ratios[1], ratios[2] - ratios[3]]
    assert found["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))
    assert found["chosen_log_ratio"] == pytest.approx((ratios[0] + ratios[2]) / 2, abs=1e-5)


def _by_first_token(groups: Sequence[Group], logps: Sequence[list[float]]) -> list[tuple[int, list[float]]]:
    samples = [s for g in groups for s in g.samples]
    return [(int(s.tokens[s.origin != Origin.PROMPT][0]), p) for s, p in zip(samples, logps, strict=True)]


# ---- the pair


def test_best_against_worst() -> None:
    group = group_of([0.2, 1.0, 0.0, 1.0, 0.0], [1] * 5)
    credited = DPO().credit(group)
    assert [s.reward for s in credited.samples] == [1.0, 0.0]
    assert [s.tokens[-1] for s in credited.samples] == [group.samples[i].tokens[-1] for i in (1, 2)]
    assert [float(s.advantage[-1]) for s in credited.samples if s.advantage is not None] == [1.0, -1.0]
    assert DPO().wants(group, "reference").tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0]])
def test_a_group_without_contrast_is_turned_away(rewards: list[float]) -> None:
    group = group_of(rewards, [1] * len(rewards))
    assert DPO().credit(group).samples == ()
    assert not DPO().wants(group, "reference").any()


def test_what_was_broken_off_or_is_empty_is_not_taken() -> None:
    group = group_of([1.0, 1.0, 0.0, 0.0], [2, 3, 0, 4])
    broken = replace(group.samples[0], finish=Finish.ABORTED)
    assert DPO().pair(replace(group, samples=(broken, *group.samples[1:]))) == (1, 3)
    assert DPO().pair(replace(group, samples=())) is None


def shown(rewards: Sequence[float], demonstration: list[int], count: int = 1) -> tuple[Group, list[tuple[str, str]]]:
    """The group after guidance. FakeVerify: right if the first token is odd."""
    prompt = prompt_of(2)
    if demonstration:
        prompt = replace(prompt, demonstrations=(Demonstration("t", np.array(demonstration, np.int32)),))
    group = group_of(rewards, [2] * len(rewards), prompt=prompt)
    reports: list[tuple[str, str]] = []
    ask = Services(FakePolicy(), FakeVerify(), report=lambda kind, text: reports.append((kind, text)))
    return asyncio.run(Shown(count)(group, ask, {})), reports


def test_a_demonstration_may_be_the_chosen_one() -> None:
    group, reports = shown([0.0, 1.0], [51, 52])
    assert [s.guided for s in group.samples] == [False, False, True]
    assert DPO().pair(group) == (2, 0)
    credited = with_reference(DPO().credit(group), [-1.0, -1.0])
    value, gradient = step_loss(DPO(beta=0.3), [credited], [[-1.0, -1.0], [-1.0, -1.0]])
    assert value == pytest.approx(math.log(2))
    assert gradient[0] == pytest.approx([-0.15, -0.15])
    assert reports == []


def test_a_wrong_demonstration_makes_no_pair() -> None:
    group, _ = shown([0.0, 1.0], [50, 52])
    assert group.samples[2].reward == 0.0
    assert DPO().pair(group) is None


def test_the_rejected_one_is_the_policys_own() -> None:
    """Two demonstrations, one of them worse than anything the policy wrote."""
    group = group_of([0.5, 1.0, 0.0], [2, 3, 4])
    theirs = [
        replace(s, origin=np.where(s.origin == Origin.POLICY, Origin.TEACHER, s.origin).astype(np.uint8))
        for s in group.samples[1:]
    ]
    assert DPO().pair(replace(group, samples=(group.samples[0], *theirs))) == (1, 0)


def test_no_demonstration_leaves_the_group() -> None:
    group, reports = shown([0.0, 1.0], [])
    assert len(group.samples) == 2
    assert reports == [("guidance", "prompt p has no demonstration")]
    assert DPO().pair(group) == (1, 0)
    group, reports = shown([0.0, 1.0], [51], count=0)
    assert len(group.samples) == 2
    assert reports == []


def test_a_missing_reference_is_an_error() -> None:
    group = DPO().credit(group_of([1.0, 0.0], [1, 1]))
    with pytest.raises(ValueError, match="reference_logp"):
        step_loss(DPO(), [group], [[-1.0], [-1.0]])


def test_the_reference_changes_the_gradient() -> None:
    groups, logps = pairs(1)
    moved = [with_reference(groups[0], [-3.0, -1.0])]
    assert step_loss(DPO(), groups, logps)[1] != step_loss(DPO(), moved, logps)[1]


def test_is_an_algorithm() -> None:
    assert isinstance(DPO(), Algorithm)
    assert isinstance(Shown(), Guidance)
    assert DPO().whole_groups
    assert DPO().needs == {Signal.REFERENCE}
    assert DPO(live=True, guidance=Shown(1)).needs == {Signal.REFERENCE, Signal.TEACHER_TEXT}
    assert DPO().problems() == []
    assert DPO(rollout=Sampled(1), guidance=Shown(1)).problems() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"ipo": True, "label_smoothing": 0.1}, "label_smoothing"),
        ({"live": True}, "live=true"),
        ({"rollout": Sampled(1)}, "rollout.samples=1"),
        ({"guidance": Shown(-1)}, "guidance.demonstrations=-1"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], named: str) -> None:
    assert named in DPO(**changes).problems()[0]
