"""LUFFY: golden numbers L1–L6 of the design notes through Sample → pack → loss, and what must hold for any step."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms import algorithm
from rlkd.algorithms.ampo import AMPO
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.luffy import LUFFY
from rlkd.config.load import load
from rlkd.core.advantage import against_own
from rlkd.core.errors import ConfigError
from rlkd.core.ports import Algorithm, Services
from rlkd.core.types import TRAINED, Demonstration, Finish, Group, Origin, Prompt, Signal
from rlkd.rollout import Demonstrated, Sampled
from tests.demonstration_help import (
    advantages,
    demonstration,
    policy_row,
    rows_of,
    services,
    teacher_row,
    with_advantages,
)
from tests.fakes import FakePolicy
from tests.test_algorithms import credited, random_step
from tests.toys import prompt_of, step_loss

PLAIN = {"entropy": 0.0, "norm_length": 8}


# Golden numbers


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, *[0] * 7], [0.875] + [-0.125] * 7),
        ([1, 1, 0, 1, 0, 0, 0, 0], [0.625, 0.625, -0.375, 0.625] + [-0.375] * 4),
        ([1] * 8, [0.0] * 8),
    ],
)
def test_l1_advantages_over_the_union(rewards: list[float], expected: list[float]) -> None:
    assert advantages(LUFFY(), rows_of(rewards, teachers=[0])) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("standardize", "expected"), [(False, 1.0), (True, 0.999999)])
def test_l2_advantages_against_the_policys_own(standardize: bool, expected: float) -> None:
    luffy = LUFFY(advantage="split", standardize=standardize)
    found = advantages(luffy, rows_of([1, *[0] * 7], teachers=[0]))
    assert found[0] == pytest.approx(expected, abs=1e-7)
    assert found[1:] == [0.0] * 7


def test_split_of_one_row_or_none_of_the_policys_own() -> None:
    rewards = np.array([1, 0.5], np.float32)
    assert against_own(rewards, np.array([False, True]), False).tolist() == [1.0, 0.5]  # μ = 0, as for a group of one
    assert against_own(rewards, np.array([False, False]), False).tolist() == [0.25, -0.25]


def one_teacher_token(luffy: LUFFY, p: float, advantage: float = 1.0) -> tuple[float, float]:
    """Loss and d loss / d log p of a step that has one token, a teacher's."""
    value, gradient = step_loss(luffy, [with_advantages([teacher_row(1, 0.0)], [advantage])], [[float(np.log(p))]])
    return value, gradient[0][0]


@pytest.mark.parametrize(
    ("p", "f", "weight"),
    [
        (0.9, 0.9, 0.09),
        (0.5, 0.833333, 0.138889),
        (0.1, 0.5, 0.25),
        (0.05, 0.333333, 0.222222),
        (0.01, 0.090909, 0.082645),
        (0.001, 0.009901, 0.009803),
    ],
)
def test_l3_shaping(p: float, f: float, weight: float) -> None:
    value, gradient = one_teacher_token(LUFFY(entropy=0.0, norm_length=1), p)
    assert value == pytest.approx(-f, abs=1e-6)
    assert gradient == pytest.approx(-weight, abs=1e-6)


@pytest.mark.parametrize(
    ("gamma", "p", "weight"), [(0.3, 0.01, 0.031217), (0.3, 0.9, 0.1875), (0.5, 0.01, 0.019223), (0.5, 0.9, 0.229592)]
)
def test_l3_other_gammas(gamma: float, p: float, weight: float) -> None:
    assert one_teacher_token(LUFFY(entropy=0.0, norm_length=1, gamma=gamma), p)[1] == pytest.approx(-weight, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "f", "weight"),
    [
        ({"shape": "raw"}, 0.25, 0.25),
        ({"shape": "sqrt"}, 0.5, 0.25),
        ({"shape": "power", "exponent": 2.0}, 0.0625, 0.125),
    ],
)
def test_other_shapes(options: dict[str, Any], f: float, weight: float) -> None:
    value, gradient = one_teacher_token(LUFFY(entropy=0.0, norm_length=1, **options), 0.25)
    assert (value, gradient) == (pytest.approx(-f, abs=1e-6), pytest.approx(-weight, abs=1e-6))


@pytest.mark.parametrize(("clip", "expected"), [(False, -1.5), (True, -1.2)])
def test_l4_clip(clip: bool, expected: float) -> None:
    group = with_advantages([policy_row([-1.0], 0.0)], [1.0])
    luffy = LUFFY(entropy=0.0, norm_length=1, clip=clip)
    assert step_loss(luffy, [group], [[-1.0 + float(np.log(1.5))]])[0] == pytest.approx(expected, abs=1e-5)


def l5() -> tuple[Group, list[list[float]]]:
    rho, behavior = np.array([1.0, 1.1, 0.9]), np.array([-1.0, -2.0, -0.5])
    rows = [teacher_row(2, 1.0), policy_row(behavior.tolist(), 0.0)]
    logps = [np.log([0.8, 0.02]).tolist(), (behavior + np.log(rho)).tolist()]
    return with_advantages(rows, [0.875, -0.125]), logps


def test_l5_one_formula_for_both() -> None:
    group, logps = l5()
    released = step_loss(LUFFY(official_compat=True, **PLAIN), [group], logps)[0]
    assert released == pytest.approx(-0.0685764, abs=1e-6)
    assert step_loss(LUFFY(**PLAIN), [group], logps)[0] == pytest.approx(-0.0685764 / 2, abs=1e-6)


def test_l5_token_by_token() -> None:
    group, logps = l5()
    expected = [[-0.777778, -0.145833], [0.125, 0.1375, 0.1125]]
    luffy = LUFFY(entropy=0.0, norm_length=1)
    for i, row in enumerate(group.samples):
        for t, value in enumerate(expected[i]):
            place = 3 + t
            cut = {n: getattr(row, n)[[0, place]] for n in ("tokens", "origin", "behavior_logp", "advantage")}
            alone = Group(group.prompt, (replace(row, **cut),))
            assert step_loss(luffy, [alone], [[logps[i][t]]])[0] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("ratio", "length"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.8, 4), (1.0, 6)])
def test_l6_prefix(ratio: float, length: int) -> None:
    rollout = Demonstrated(samples=3, prefix_min=ratio, prefix_max=ratio)
    group = roll(rollout, helped(demonstration([60, 61, 62, 63, 64, 65])))
    taught = [s.tokens[s.origin == Origin.TEACHER].tolist() for s in group.samples]
    assert taught == [[], [], [60, 61, 62, 63, 64, 65][:length]]
    last = group.samples[-1]
    written = last.origin == Origin.POLICY
    assert written.any() == (ratio < 1)
    assert np.isfinite(last.behavior_logp[written]).all()
    assert np.isnan(last.behavior_logp[~written]).all()
    own = int(written.sum())
    assert last.origin.tolist() == [Origin.PROMPT] * 3 + [Origin.TEACHER] * length + [Origin.POLICY] * own


# The rollout


def helped(*demonstrations: Demonstration, seed: int = 5) -> Prompt:
    return replace(prompt_of(), demonstrations=demonstrations, seed=seed)


def roll(rollout: Sampled, prompt: Prompt, ask: Services | None = None) -> Group:
    return asyncio.run(rollout(prompt, ask or services(), {}))


def same(a: Group, b: Group) -> bool:
    return len(a.samples) == len(b.samples) and all(
        s.tokens.tolist() == t.tokens.tolist() and s.origin.tolist() == t.origin.tolist()
        for s, t in zip(a.samples, b.samples, strict=True)
    )


def test_k_of_the_samples_are_demonstrations() -> None:
    prompt = helped(demonstration([7, 8]), demonstration([9]), demonstration([5, 6, 7]))
    group = roll(Demonstrated(samples=5, demonstrations=2), prompt)
    assert [s.guided for s in group.samples] == [False] * 3 + [True] * 2
    assert same(group, roll(Demonstrated(samples=5, demonstrations=2), prompt))
    drawn = {tuple(roll(Demonstrated(), replace(prompt, seed=seed)).samples[-1].tokens.tolist()) for seed in range(20)}
    assert len(drawn) == 3  # from occurrence to occurrence another one


@given(seed=st.integers(0, 2**63 - 1), samples=st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_without_a_demonstration_it_is_the_plain_rollout(seed: int, samples: int) -> None:
    plain = roll(Sampled(samples), helped(seed=seed))
    assert same(roll(Demonstrated(samples), helped(seed=seed)), plain)
    helped_group = roll(Demonstrated(samples), helped(demonstration([7]), seed=seed))
    assert same(Group(plain.prompt, helped_group.samples[:-1]), Group(plain.prompt, plain.samples[:-1]))


def test_fewer_demonstrations_than_asked_for() -> None:
    group = roll(Demonstrated(samples=4, demonstrations=3), helped(demonstration([7])))
    assert [s.guided for s in group.samples] == [False, False, False, True]


def test_what_a_prefix_leaves_of_the_answer() -> None:
    asked: list[Any] = []

    class Noting(FakePolicy):
        async def generate(self, tokens: Any, n: int = 1, seed: int = 0, sampling: Any = None) -> Any:
            asked.append((tokens.tolist(), n, sampling))
            return await super().generate(tokens, n, seed, sampling)

    rollout = Demonstrated(samples=3, prefix_min=0.5, prefix_max=0.5)
    roll(rollout, helped(demonstration([7, 8, 9, 10])), services(Noting(), max_tokens=20))
    assert [(tokens, n) for tokens, n, _ in asked] == [([1, 2, 3], 2), ([1, 2, 3, 7, 8], 1)]
    assert asked[0][2] is None
    assert asked[1][2].max_tokens == 18


def test_a_ratio_between_its_bounds_drawn_by_the_seed() -> None:
    rollout = Demonstrated(samples=2, prefix_min=0.2, prefix_max=0.7)
    lengths = set()
    for seed in range(60):
        last = roll(rollout, helped(demonstration(range(100, 200)), seed=seed)).samples[-1]
        lengths.add(int((last.origin == Origin.TEACHER).sum()))
    assert min(lengths) >= 20
    assert max(lengths) <= 70
    assert len(lengths) > 20


def test_a_prefix_without_the_answers_limit_is_an_error() -> None:
    ask = replace(services(), sampling=None)
    assert roll(Demonstrated(samples=2), helped(demonstration([7])), ask).samples[-1].guided  # whole: not needed
    with pytest.raises(ValueError, match="sampling"):
        roll(Demonstrated(samples=2, prefix_min=0.5), helped(demonstration([7, 8, 9])), ask)


def test_live_traces_are_asked_first() -> None:
    class Live:
        async def __call__(self, prompt: Prompt) -> tuple[Demonstration, ...]:
            return (demonstration([42]),)

    group = roll(Demonstrated(samples=2), helped(demonstration([7])), services(traces=Live()))
    assert group.samples[-1].tokens.tolist() == [1, 2, 3, 42]


# The loss


@given(
    seed=st.integers(0, 10_000),
    options=st.sampled_from(
        [
            {},
            {"standardize": True},
            {"norm": "token"},
            {"norm": "sequence", "beta": 0.1, "kl": "k2"},
            {"dual_clip": 3.0},
        ]
    ),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("advantage", ["union", "split"])
def test_without_demonstrations_it_is_grpo(advantage: Any, seed: int, options: dict[str, Any]) -> None:
    shared = {"standardize": False, "norm": "constant", "norm_length": 16, "entropy": 0.001, **options}
    groups, logps = random_step(seed)
    grpo, luffy = GRPO(**shared), LUFFY(clip=True, advantage=advantage, **shared)
    expected, expected_gradient = step_loss(grpo, credited(grpo, groups), logps)
    found, gradient = step_loss(luffy, credited(luffy, groups), logps)
    # A deviation of 0 is taken as 1 in "split", where all differences are 0 anyway.
    assert found == pytest.approx(expected, abs=2e-6)
    for a, b in zip(gradient, expected_gradient, strict=True):
        assert a == pytest.approx(b, abs=2e-6)


def test_without_clip_it_is_grpo_with_bounds_that_are_never_reached() -> None:
    groups, logps = random_step(11)
    shared = {"standardize": False, "norm": "constant", "norm_length": 16}
    grpo, luffy = GRPO(clip_low=1e6, clip_high=1e6, **shared), LUFFY(entropy=0.0, **shared)
    assert step_loss(luffy, credited(luffy, groups), logps)[1] == step_loss(grpo, credited(grpo, groups), logps)[1]


def mixed_step(seed: int) -> tuple[list[Group], list[list[float]]]:
    """Groups whose first sample is a teacher's, and whose second a teacher began."""
    groups, logps = random_step(seed)
    made = []
    for group in groups:
        rows = list(group.samples)
        for i, keep in ((0, len(rows[0].tokens)), (1, 4)):
            origin, behavior = rows[i].origin.copy(), rows[i].behavior_logp.copy()
            origin[3:keep], behavior[3:keep] = Origin.TEACHER, np.nan
            rows[i] = replace(rows[i], origin=origin, behavior_logp=behavior)
        made.append(replace(group, samples=tuple(rows)))
    return made, logps


@pytest.mark.parametrize("luffy", [
    LUFFY(norm_length=16), LUFFY(norm="token"), LUFFY(norm="sequence", advantage="split"),
    LUFFY(norm_length=16, sft_weight=0.5), LUFFY(norm_length=16, correction="tis", dual_clip=3.0, clip=True),
], ids=["constant", "token", "split", "sft", "tis"])  # fmt: skip
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 3), max_tokens=st.sampled_from([14, 20, 1000]))
@settings(max_examples=8, deadline=None)
def test_mixed_gradient_does_not_depend_on_the_split(luffy: LUFFY, seed: int, ranks: int, max_tokens: int) -> None:
    groups, logps = mixed_step(seed)
    groups = credited(luffy, groups)
    value, gradient = step_loss(luffy, groups, logps)
    again, split = step_loss(luffy, groups, logps, ranks, max_tokens)
    assert np.isfinite(value)
    assert again == pytest.approx(value, abs=2e-6)
    for a, b in zip(gradient, split, strict=True):
        assert b == pytest.approx(a, abs=2e-6)


def test_likelihood_instead_of_shaping() -> None:
    """sft_weight: PPO on the policy's own rows, and the mean negative log-likelihood of the teachers' tokens."""
    group, logps = l5()
    plain = step_loss(LUFFY(**PLAIN, sft_weight=0.5), [group], logps)
    own = (0.125 + 0.1375 + 0.1125) / (2 * 8)
    assert plain[0] == pytest.approx(own + 0.5 * float(-np.mean(np.log([0.8, 0.02]))), abs=1e-6)
    assert plain[1][0] == pytest.approx([-0.25, -0.25], abs=1e-6)


def test_the_advantage_of_a_cut_answer_can_be_dropped() -> None:
    group = rows_of([1, 0, 0, 1], teachers=[0])
    cut = replace(group, samples=(*group.samples[:3], replace(group.samples[3], finish=Finish.LENGTH)))
    assert advantages(LUFFY(), cut) == pytest.approx([0.5, -0.5, -0.5, 0.5])
    assert advantages(LUFFY(drop_truncated_advantage=True), cut) == pytest.approx([0.5, -0.5, -0.5, 0.0])


def test_a_wrong_teacher_is_pushed_away_from() -> None:
    """Its advantage is negative where the policy succeeds: the trap of §1.5, weighed by f."""
    group = rows_of([0, 1, 1, 1], teachers=[0])
    luffy = LUFFY(**PLAIN)
    _, gradient = step_loss(luffy, [luffy.credit(group)], [[-1.0, -1.0]] * 4)
    assert min(gradient[0]) > 0


def test_the_teachers_probability_is_a_metric_only_where_there_is_a_teacher() -> None:
    from rlkd.core.batch import pack
    from tests.toys import output_of

    def metrics(rows: Sequence[Any]) -> Any:
        import torch

        (turn,) = pack([with_advantages(rows, [0.0] * len(rows))], 1, 1000)
        x = turn[0]
        logp = torch.full((int(x.mask(TRAINED).sum()),), -1.0)
        return LUFFY(**PLAIN).loss(output_of(logp, x), x, {}).metrics

    assert "teacher_probability" not in metrics([policy_row([-1.0], 0.0)])
    both = metrics([policy_row([-1.0], 0.0), teacher_row(2, 1.0)])
    assert float(both["teacher_probability"]) == pytest.approx(float(np.exp(-1)), abs=1e-6)


# The configuration


@pytest.mark.parametrize("made", [LUFFY(norm_length=8), AMPO(norm_length=8)])
def test_is_an_algorithm(made: Any) -> None:
    assert isinstance(made, Algorithm)
    assert type(made) is algorithm(made.name)
    assert made.problems() == []


def test_live_teachers_are_a_need_only_if_asked_for() -> None:
    assert LUFFY().needs == frozenset()
    assert LUFFY(live=True, beta=0.1).needs == {Signal.TEACHER_TEXT, Signal.REFERENCE}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm_length": None}, "norm_length"),
        ({"gamma": 0.0}, "gamma=0.0 must be above 0"),
        ({"sft_weight": -1.0}, "sft_weight"),
        ({"official_compat": True, "norm": "token"}, "official_compat"),
        ({"rollout": Demonstrated(samples=4, demonstrations=4)}, "rollout.demonstrations=4 must be"),
        ({"rollout": Demonstrated(prefix_min=0.8, prefix_max=0.5)}, "rollout.prefix_min=0.8"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], said: str) -> None:
    (problem,) = LUFFY(**{"norm_length": 8, **options}).problems()
    assert said in problem


RECIPE = """
model: {path: m}
data: {train: {path: a.jsonl}, holdout: {path: b.jsonl}}
algorithm: {name: luffy, norm_length: 8}
rewards: {exact: {}}
schedule: {steps: 1}
"""


@pytest.mark.parametrize(
    ("overrides", "fine"),
    [
        ([], False),
        (["algorithm.name=ampo"], False),
        (["data.train.demonstrations=worked"], True),
        (["data.train.traces=t.jsonl"], True),
        (["algorithm.live=true", "teachers.t.path=x"], True),
        (["data.train.kind=arithmetic", "data.train.size=100"], False),
        (["data.train.kind=arithmetic", "data.train.size=100", "data.train.options.demonstrations=1"], True),
    ],
)
def test_a_recipe_without_worked_answers_is_a_mistake(tmp_path: Path, overrides: list[str], fine: bool) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    if fine:
        assert load(tmp_path / "r.yaml", overrides).algorithm.demonstrated
        return
    with pytest.raises(ConfigError, match=r"takes worked answers, and data\.train has none"):
        load(tmp_path / "r.yaml", overrides)
