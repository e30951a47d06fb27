"""AMPO: golden numbers A1–A7 of the design notes through the public path, and guidance on demand with its edge cases.

A1 (the reward) is in test_rewards_tally.py; its trigger is here.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms.ampo import AMPO
from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import pack
from rlkd.core.types import Demonstration, Group, Origin, Prompt, Sample, Signal
from rlkd.curriculum import Difficulty
from rlkd.data import HFTokenizer
from rlkd.guidance.comprehension import Tags, ranked, spliced, to_bfloat16, understood
from rlkd.guidance.replace import Replacement
from rlkd.models.tiny import character_tokenizer
from rlkd.report.metrics import Observed
from tests.demonstration_help import Reader, advantages, policy_row, rows_of, services, teacher_row, with_advantages
from tests.small_tokenizers import wrapped
from tests.test_algorithms import credited, random_step
from tests.toys import output_of, prompt_of, step_loss

TOKENIZER = wrapped()
DEFAULT = Replacement()


def trace(text: str, teacher: str = "t", quality: float = math.nan) -> Demonstration:
    ids = TOKENIZER.encode_many([text], special=False)[0]
    return Demonstration(teacher, np.append(ids, TOKENIZER.eos).astype(np.int32), float(quality))


def asked(*traces: Demonstration, answer: str = "825", seed: int = 3) -> Prompt:
    return replace(prompt_of(), tokens=TOKENIZER.chat([{"role": "user", "content": "357+468?"}]), answer=answer,
                   demonstrations=traces, seed=seed)  # fmt: skip


def failed(prompt: Prompt, rewards: Sequence[float]) -> Group:
    rows = [policy_row([-1.0, -2.0], r, 10 * (i + 1), prompt) for i, r in enumerate(rewards)]
    return Group(prompt, tuple(rows))


@dataclass
class Told:
    """What was reported."""

    lines: list[tuple[str, str]]

    def __call__(self, kind: str, text: str) -> None:
        self.lines.append((kind, text))

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.lines)


def guided(
    group: Group,
    guidance: Replacement = DEFAULT,
    reward: Callable[[Sample], float] = lambda _: 1.0,
    says: Callable[[str], Sequence[float]] = lambda _: [-1.0] * 3,
    **more: Any,
) -> tuple[Group, Reader, Told]:
    reader, told = Reader(tokenizer=TOKENIZER, says=says), Told([])
    ask = services(reader, reward, TOKENIZER, report=told, **{"max_tokens": 500, **more})
    return asyncio.run(guidance(group, ask, {})), reader, told


def injected(group: Group) -> list[str]:
    return [TOKENIZER.decode(s.tokens[s.origin == Origin.TEACHER]) for s in group.samples if s.guided]


RIGHT = "so it is <answer> 825 </answer>"


# A1: when


def test_a1_a_group_without_a_right_answer_is_helped() -> None:
    rewards = [0.1, 0, 0.1, 0, 0, 0, 0, -0.1]
    group, _, _ = guided(failed(asked(trace(RIGHT)), rewards))
    assert injected(group) == [RIGHT]
    one_right = failed(asked(trace(RIGHT)), [*rewards[:-1], 0.9])
    assert guided(one_right)[0] is one_right


@pytest.mark.parametrize(("trigger", "times"), [("adaptive", 0), ("always", 400), ("hybrid", 120)])
def test_triggers_where_some_are_right(trigger: Any, times: int) -> None:
    guidance, prompt = Replacement(trigger=trigger), asked(trace(RIGHT))
    groups = [failed(replace(prompt, seed=seed), [1, 0, 0, 1]) for seed in range(400)]
    helped = [guided(g, guidance)[0] for g in groups]
    assert sum(bool(injected(g)) for g in helped) == pytest.approx(times, abs=0 if times != 120 else 30)
    assert all(not s.guided for g in helped for s in (g.samples[0], g.samples[3]))  # right rows stay


def test_nothing_wrong_nothing_to_replace() -> None:
    group = failed(asked(trace(RIGHT)), [1, 1])
    assert guided(group, Replacement(trigger="always"))[0] is group


# A2: which


A2 = {
    "T1": ([-0.1, -0.7, -2.0], "T1 <answer>x</answer>"),
    "T2": ([-0.05] * 3, "T2 <answer>x</answer>"),
    "T3": ([-0.01, -0.02, -0.01], "T3 <answer>x, without an end"),
    "T4": ([-0.001] * 3, "T4 825, without a place"),
    "T5": ([-0.3] * 3, "T5 <answer>x</answer>"),
}


@pytest.mark.parametrize(
    ("name", "mean", "rounded", "key"),
    [
        ("T1", 0.512253, 0.51171875, 0.560547),
        ("T2", 0.951229, 0.953125, 0.957812),
        ("T3", 0.986766, 0.98828125, 0.889453),
        ("T5", 0.740818, 0.7421875, 0.767969),
    ],
)
def test_a2_comprehension(name: str, mean: float, rounded: float, key: float) -> None:
    logp, text = A2[name]
    found = understood(np.array(logp, np.float32), "mean_prob")
    assert found == pytest.approx(mean, abs=1e-6)
    assert to_bfloat16(found) == rounded
    assert 0.9 * rounded + 0.1 * Tags().well_formed(text) == pytest.approx(key, abs=1e-6)


def test_a2_other_aggregates() -> None:
    logp = np.array(A2["T1"][0], np.float32)
    assert understood(logp, "geometric") == pytest.approx(0.393241, abs=1e-6)
    assert understood(logp, "product") == pytest.approx(0.060810, abs=1e-6)
    assert understood(logp, "mean_logp") == pytest.approx(-2.8 / 3, abs=1e-6)


def says(text: str) -> Sequence[float]:
    assert text.endswith("825")  # Ω is the end of what is read: nothing behind it is
    return next(logp for name, (logp, _) in A2.items() if name in text)


@pytest.mark.parametrize("order", [["T1", "T2", "T3", "T4", "T5"], ["T4", "T5", "T1", "T3", "T2"]])
@pytest.mark.parametrize("official", [False, True])
def test_a2_the_two_best_are_taken(order: list[str], official: bool) -> None:
    prompt = asked(*(trace(A2[name][1], name) for name in order))
    guidance = Replacement(max_teachers=5, official_compat=official)
    group, reader, told = guided(failed(prompt, [0] * 8), guidance, says=says)
    assert {text[:2] for text in injected(group)} == {"T2", "T3"}
    assert reader.calls_of_logp == 1  # one call for all traces
    assert len(reader.read) == 4
    assert "1 of 5 traces have no single `<answer>`" in told.text


def test_a2_one_that_says_nothing_is_last_but_can_be_taken() -> None:
    prompt = asked(*(trace(A2[name][1], name) for name in ("T4", "T5", "T1")))
    group, _, _ = guided(failed(prompt, [0, 0]), Replacement(replace_at_most=1), says=says)
    assert [t[:2] for t in injected(group)] == ["T5"]
    for aggregate in ("mean_logp", "mean_prob"):
        guidance = Replacement(replace_at_most=2, aggregate=aggregate)
        group, _, _ = guided(failed(prompt, [0, 0]), guidance, says=says)
        assert {t[:2] for t in injected(group)} == {"T5", "T1"}


def test_comprehension_by_another_aggregate_chooses_others() -> None:
    """The arithmetic mean forgives one unlikely token, the product does not."""
    low = {"A": [-0.01, -0.01, -3.0], "B": [-0.5, -0.5, -0.5]}
    prompt = asked(trace("A <answer>x</answer>"), trace("B <answer>x</answer>"))

    def chosen(aggregate: Any) -> str:
        guidance = Replacement(replace_at_most=1, aggregate=aggregate)
        group, _, _ = guided(failed(prompt, [0, 0]), guidance, says=lambda t: low["A" if "A <" in t else "B"])
        return injected(group)[0][0]

    assert (chosen("mean_prob"), chosen("product"), chosen("geometric")) == ("A", "B", "B")


def test_no_choice_no_question() -> None:
    """As many traces as rows to replace: which comes where trains the same, so the policy is not asked."""
    two = failed(asked(trace("A " + RIGHT), trace("B " + RIGHT)), [0] * 4)
    group, reader, _ = guided(two)
    assert len(injected(group)) == 2
    assert reader.calls_of_logp == 0
    assert guided(two, Replacement(official_compat=True))[1].calls_of_logp == 1
    one_wrong = failed(two.prompt, [1, 1, 0])
    assert guided(one_wrong, Replacement(trigger="always"))[1].calls_of_logp == 1


# Where the answer is put


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a <answer>x</answer> b", "a <answer> 825"),
        ("a <answer>\n x</answer>", "a <answer>\n 825"),
        ("a <answer>", "a <answer> 825"),
    ],
)
def test_the_answer_stands_behind_the_tag(text: str, read: str) -> None:
    prompt = asked().tokens
    found = spliced(prompt, text, "825", Tags(), TOKENIZER)
    assert found is not None
    assert TOKENIZER.decode(found.tokens[len(prompt) :]) == read
    assert TOKENIZER.decode(found.tokens[found.omega]) == "825"
    assert found.tokens[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("text", ["", "no tag", "<answer>x</answer> or <answer>y</answer>"])
def test_no_single_tag_no_place(text: str) -> None:
    assert spliced(asked().tokens, text, "825", Tags(), TOKENIZER) is None


def test_an_empty_closing_tag_as_in_the_tiny_task() -> None:
    tokenizer = HFTokenizer(character_tokenizer())
    tags = Tags("#", "", "")
    found = spliced(tokenizer.encode("357+468="), "7+8+0=15;#999", "825", tags, tokenizer)
    assert found is not None
    assert tokenizer.decode(found.tokens) == "357+468=7+8+0=15;#825"
    assert tokenizer.decode(found.tokens[found.omega]) == "825"
    assert tags.well_formed("…#8")
    assert not tags.well_formed("#8#8")


@pytest.mark.parametrize(
    ("text", "fine"),
    [("<answer>1</answer>", True), ("</answer>1<answer>", False), ("<answer>1", False), ("<answer></answer></answer>",
     False)],
)  # fmt: skip
def test_well_formed(text: str, fine: bool) -> None:
    assert Tags().well_formed(text) == fine


def test_ranked_keeps_the_order_of_equals() -> None:
    assert ranked([0.5, -math.inf, 0.9, 0.5]) == [2, 0, 3, 1]


# A3 – A6: advantages and loss


def test_a3_advantages_of_the_mixed_group() -> None:
    group = rows_of([0, 1, 0.1, 0, 1, 0, 0, 0], teachers=[1, 4])
    plain = advantages(AMPO(), group)
    assert [plain[i] for i in (1, 4, 2, 0)] == pytest.approx([0.7375, 0.7375, -0.1625, -0.2625], abs=1e-6)
    std = advantages(AMPO(standardize=True), group)
    assert [std[i] for i in (1, 2, 0)] == pytest.approx([1.615547, -0.355968, -0.575025], abs=2e-6)
    assert advantages(AMPO(advantage="split"), group)[1] == pytest.approx(0.983333, abs=1e-6)
    assert advantages(AMPO(advantage="split", standardize=True), group)[1] == pytest.approx(24.086, abs=1e-2)
    assert "split with standardize" in AMPO(norm_length=8, advantage="split", standardize=True).problems()[0]


@pytest.mark.parametrize(
    ("p", "loss", "slope"),
    [
        (0.9, -0.675, -0.0675),
        (0.5, -0.625, -0.104167),
        (0.1, -0.375, -0.1875),
        (0.05, -0.25, -0.166667),
        (0.01, -0.068182, -0.061983),
        (0.001, -0.007426, -0.007352),
    ],
)
def test_a4_a_traces_token(p: float, loss: float, slope: float) -> None:
    ampo = AMPO(entropy=0.0, norm_length=1)
    value, gradient = step_loss(ampo, [with_advantages([teacher_row(1, 0.0)], [0.75])], [[math.log(p)]])
    assert (value, gradient[0][0]) == (pytest.approx(loss, abs=1e-6), pytest.approx(slope, abs=1e-6))


def a5() -> tuple[Group, list[list[float]]]:
    behavior, rho = np.array([-1.0, -2.0, -0.5, -0.7]), np.array([1.0, 1.3, 0.7, 1.0])
    rows = [teacher_row(3, 1.0), policy_row(behavior.tolist(), 0.0)]
    logps = [np.log([0.5, 0.05, 0.9]).tolist(), (behavior + np.log(rho)).tolist()]
    return with_advantages(rows, [0.75, -0.25]), logps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"norm_length": 4, "official_compat": True}, -0.13125),
        ({"norm_length": 4}, -0.065625),
        ({"norm": "token"}, -0.075),
        ({"norm": "sequence"}, -0.130208),
    ],
)
def test_a5_averages(options: dict[str, Any], expected: float) -> None:
    group, logps = a5()
    assert step_loss(AMPO(entropy=0.0, **options), [group], logps)[0] == pytest.approx(expected, abs=1e-6)


def test_a6_the_loss_does_not_depend_on_packing_and_the_released_scale_does() -> None:
    group, logps = a5()
    assert len(pack([group], 1, 1000)) == 1
    assert len(pack([group], 1, 8)) == 2
    for together, apart, options in ((-0.065625, -0.065625, {}), (-0.13125, -0.065625, {"official_compat": True})):
        ampo = AMPO(entropy=0.0, norm_length=4, **options)
        assert step_loss(ampo, [group], logps)[0] == pytest.approx(together, abs=1e-6)
        assert step_loss(ampo, [group], logps, max_tokens=8)[0] == pytest.approx(apart, abs=1e-6)


def test_the_dual_clip_is_the_policys_alone() -> None:
    rows = [policy_row([-5.0], 0.0), teacher_row(1, 0.0)]
    group, logps = with_advantages(rows, [-1.0, -1.0]), [[-5.0 + math.log(15.0)], [math.log(0.9)]]
    value, gradient = step_loss(AMPO(entropy=0.0, norm_length=1), [group], logps)
    assert value == pytest.approx((10.0 + 0.9) / 2, abs=1e-5)
    assert gradient[0] == [0.0]
    assert gradient[1][0] > 0


# A7: rewards of what is injected


@pytest.mark.parametrize(("options", "rewards"), [
    ({}, []), ({"force_guide_reward": True}, [1.0]), ({"official_compat": True}, [1.0])])  # fmt: skip
@pytest.mark.parametrize("verified", [0.1, math.nan])
def test_a7_a_wrong_trace(options: dict[str, Any], rewards: list[float], verified: float) -> None:
    wrong = failed(asked(trace("it is <answer> 1 </answer>")), [0, 0])
    group, _, told = guided(wrong, Replacement(**options), lambda _: verified)
    assert [s.reward for s in group.samples if s.guided] == rewards
    assert (group is wrong) == (not rewards)
    assert ("1 of 1 traces are wrong or could not be judged" in told.text) == (not rewards)


def test_right_traces_keep_their_own_reward_and_wrong_ones_make_room() -> None:
    rewards = {"A": 0.9, "B": 0.1, "C": 1.0}
    prompt = asked(*(trace(f"{name} {RIGHT}") for name in rewards))

    def verified(sample: Sample) -> float:
        return rewards[TOKENIZER.decode(sample.tokens[sample.origin == Origin.TEACHER])[0]]

    group, _, told = guided(failed(prompt, [0] * 4), reward=verified)
    own = [s.reward for s in group.samples if s.guided]
    assert sorted(zip(own, [t[0] for t in injected(group)], strict=True)) == [(0.9, "A"), (1.0, "C")]
    assert "1 of 3 traces" in told.text


# Rows


def test_whole_rows_are_replaced_and_the_others_stay() -> None:
    before = failed(asked(trace("A " + RIGHT), trace("B " + RIGHT)), [0, 0.1, 0, 0])
    group, _, _ = guided(before)
    assert len(group.samples) == 4
    for old, new in zip(before.samples, group.samples, strict=True):
        if not new.guided:
            assert new is old
            continue
        written = new.origin != Origin.PROMPT
        assert (new.origin[written] == Origin.TEACHER).all()
        assert np.isnan(new.behavior_logp).all()
        assert new.tokens[-1] == TOKENIZER.eos
        assert new.tokens[~written].tolist() == before.prompt.tokens.tolist()
    assert sorted(injected(group)) == ["A " + RIGHT, "B " + RIGHT]


def test_what_gave_way_still_counts_in_curves_and_pass_rates() -> None:
    """Else a failed group would weigh less than others, and the reward's curve would flatter."""
    before = failed(asked(trace("A " + RIGHT), trace("B " + RIGHT)), [0, 0.1, 0, 0])
    group, _, _ = guided(before)
    assert {id(s) for s in group.own} == {id(s) for s in before.samples}
    credited_group = AMPO(norm_length=8).credit(group)
    assert len(pack([credited_group], 1, 4096)[0][0].reward) == 4
    observed = Observed(success=0.6)
    observed.add(group, {})
    observed.add(failed(asked(), [1, 1, 1, 1]), {})
    row = observed.row()
    assert (row["reward/mean"], row["right"], row["reward/guided"]) == (pytest.approx(4.1 / 8), 0.5, 1.0)
    assert (row["guided"], row["groups/all_wrong"]) == (pytest.approx(2 / 8), 0.5)
    curriculum = Difficulty([group.prompt], "f", 0)
    curriculum.observe(group)
    assert curriculum.records[0].rate == 0.0


def test_rows_are_drawn_by_the_prompts_seed() -> None:
    prompt = asked(trace(RIGHT))
    drawn = Counter()
    for seed in range(400):
        group, _, _ = guided(failed(replace(prompt, seed=seed), [0] * 4))
        places = tuple(i for i, s in enumerate(group.samples) if s.guided)
        again, _, _ = guided(failed(replace(prompt, seed=seed), [0] * 4))
        assert places == tuple(i for i, s in enumerate(again.samples) if s.guided)
        drawn[places] += 1
    assert set(drawn) == {(0,), (1,), (2,), (3,)}
    assert min(drawn.values()) > 60


def test_the_versions_are_those_of_the_group() -> None:
    group = failed(asked(trace(RIGHT)), [0, 0])
    versions = ((3, 4), (4, 6))
    group = replace(group, samples=tuple(replace(s, versions=v) for s, v in zip(group.samples, versions, strict=True)))
    helped, _, _ = guided(group)
    assert next(s.versions for s in helped.samples if s.guided) == (3, 6)


# Pools


def test_an_empty_pool_leaves_the_group_and_says_so() -> None:
    group = failed(asked(), [0, 0])
    same, reader, told = guided(group)
    assert same is group
    assert reader.calls_of_logp == 0
    assert told.lines == [("guidance", "prompt p: no row is right enough, and there is no trace for it")]


def test_a_group_that_nobody_could_judge_is_left_alone() -> None:
    group = Group(asked(trace(RIGHT)), ())
    assert guided(group)[0] is group


def test_a_pool_of_more_than_four_is_cut_to_the_best_by_quality() -> None:
    traces = [trace(f"{i} {RIGHT}", quality=q) for i, q in enumerate([1, math.nan, 3, 2, 5, 4])]
    guidance = Replacement(replace_at_most=6)
    group, _, _ = guided(failed(asked(*traces), [0] * 8), guidance)
    assert sorted(t[0] for t in injected(group)) == ["2", "3", "4", "5"]
    unknown = [trace(f"{i} {RIGHT}") for i in range(6)]
    group, _, _ = guided(failed(asked(*unknown), [0] * 8), guidance)
    assert sorted(t[0] for t in injected(group)) == ["0", "1", "2", "3"]  # in their order where nothing is known


def test_live_traces_are_asked() -> None:
    class Live:
        async def __call__(self, prompt: Prompt) -> tuple[Demonstration, ...]:
            return (*prompt.demonstrations, trace("live " + RIGHT))

    group, _, _ = guided(failed(asked(), [0, 0]), traces=Live())
    assert injected(group) == ["live " + RIGHT]


def test_another_tokenizers_trace_is_a_text() -> None:
    """A trace comes as the policy's own tokens, whoever wrote it, and what is read is one text in these tokens."""
    group, reader, _ = guided(failed(asked(*(trace(f"{c} ü→{RIGHT}") for c in "ABC")), [0, 0]))
    assert all("ü→so it is <answer> 825" in text for text in reader.read)
    assert all("ü→" in text for text in injected(group))


def test_a_trace_without_room_for_the_answer_is_not_read() -> None:
    """What is read stays below prompt + sampler.max_tokens, which the model has room for in any case."""
    long, short = trace("x" * 60 + " <answer>1</answer>"), trace("y <answer>1</answer>")
    group, reader, told = guided(failed(asked(long, short, short), [0]), Replacement(replace_at_most=1), max_tokens=60)
    assert len(reader.read) == 2
    assert "1 of 3 traces" in told.text
    assert injected(group)[0].startswith("y")


def test_without_a_tokenizer_it_is_an_error() -> None:
    group = failed(asked(*(trace(f"{c} {RIGHT}") for c in "ABC")), [0, 0])
    with pytest.raises(ValueError, match="tokenizer"):
        asyncio.run(Replacement()(group, services(Reader()), {}))


# The whole


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_without_a_failed_group_it_is_grpo(seed: int) -> None:
    groups, logps = random_step(seed)
    one_right = [replace(g, samples=(replace(g.samples[0], reward=1.0), *g.samples[1:])) for g in groups]
    shared = {"standardize": False, "norm": "constant", "norm_length": 16, "entropy": 0.001, "dual_clip": 10.0}
    ampo, grpo = AMPO(norm_length=16), GRPO(**shared)
    helped = [guided(g)[0] for g in one_right]
    assert all(a is b for a, b in zip(helped, one_right, strict=True))
    assert step_loss(ampo, credited(ampo, helped), logps) == step_loss(grpo, credited(grpo, one_right), logps)


def test_a_helped_group_has_something_to_learn_where_grpo_has_nothing() -> None:
    before = failed(asked(trace("A " + RIGHT), trace("B " + RIGHT)), [0] * 4)
    ampo = AMPO(norm_length=16)
    assert not np.any([s.advantage for s in ampo.credit(before).samples])
    helped = ampo.credit(guided(before, ampo.guidance)[0])
    assert [float(s.advantage[-1]) for s in helped.samples if s.guided] == [0.5, 0.5]
    assert [float(s.advantage[-1]) for s in helped.samples if not s.guided] == [-0.5, -0.5]
    for turn in pack([helped], 1, 4096):
        import torch

        trained = int((turn[0].origin != Origin.PROMPT).sum())
        logp = torch.full((trained,), -1.0, requires_grad=True)
        ampo.loss(output_of(logp, turn[0]), turn[0], {}).value.backward()
        assert logp.grad is not None
        assert torch.isfinite(logp.grad).all()


def test_one_switch_for_both_halves_of_the_released_code() -> None:
    assert AMPO(official_compat=True).guidance == Replacement(official_compat=True)
    assert AMPO().guidance == Replacement()
    assert AMPO(live=True).needs == {Signal.TEACHER_TEXT}


@pytest.mark.parametrize(
    ("guidance", "said"),
    [
        (Replacement(max_teachers=0), "guidance.max_teachers=0"),
        (Replacement(replace_at_most=0), "guidance.replace_at_most=0"),
        (Replacement(hybrid_share=1.5), "guidance.hybrid_share=1.5"),
        (Replacement(format=-1.0), "guidance.format=-1.0"),
        (Replacement(open_tag=""), "guidance.open_tag is empty"),
    ],
)
def test_contradictions_are_named(guidance: Replacement, said: str) -> None:
    (problem,) = AMPO(norm_length=8, guidance=guidance).problems()
    assert said in problem
