"""ThinkTuning: feedback, splice, schedule, AAS. Golden numbers T1–T7 and edge cases §3.8 of the design notes."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.thinktuning import ThinkTuning
from rlkd.core.aas import AAS
from rlkd.core.advantage import with_advantages
from rlkd.core.errors import ConfigError, WorkerLost
from rlkd.core.ports import Algorithm, Completion, Guidance, Sampling, Services, Written, as_sample
from rlkd.core.types import Finish, Group, Origin, Prompt, Sample, Signal
from rlkd.guidance.feedback import PCT, Feedback
from rlkd.guidance.feedback_form import Tags, parse
from rlkd.guidance.feedback_prompts import EXAMPLES, load
from rlkd.guidance.splice import is_finished
from rlkd.guidance.teaching import Teaching, how_many
from tests.toys import group_of, prompt_of, step_loss

EOS, OTHER_EOS, BOS, UNKNOWN = 2, 3, 1, 4


def good(phrase: str = "ph") -> str:
    return f"<opinion>incorrect</opinion>\n<reason>r</reason>\n<phrase>{phrase}</phrase>"


GOOD = good()


class Characters:
    """One token a character, its code; a small zoo of special tokens below 10; capital letters are unknown."""

    eos = EOS

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([self._id(c) for c in text], np.int32)
        return ids, np.array([(i, i + 1) for i in range(len(text))], np.int32).reshape(-1, 2)

    def _id(self, c: str) -> int:
        return UNKNOWN if c.isupper() else EOS if c == "¶" else ord(c)

    def encode(self, text: str) -> np.ndarray:
        return np.append(np.array([BOS], np.int32), self.spans(text)[0])

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(chr(t) for t in tokens if t >= 10)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        return self.encode("".join(m["content"] for m in messages))


@dataclass
class Teacher:
    """Writes what it is given to say, and remembers what it was told."""

    say: str | Callable[[Sequence[Mapping[str, str]]], str] = GOOD
    finish: Finish = Finish.STOP
    lost: bool = False
    heard: list[Sequence[Mapping[str, str]]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    async def write(self, messages: Sequence[Mapping[str, str]], seed: int = 0) -> Written:
        self.heard.append(messages)
        self.seeds.append(seed)
        if self.lost:
            raise WorkerLost("writer-0 died (on purpose)")
        text = self.say if isinstance(self.say, str) else self.say(messages)
        return Written(text, self.finish, len(text))


@dataclass
class Ends:
    """Right if the answer ends in the prompt's answer; one that holds `unjudged` stays without a reward."""

    unjudged: str | None = None
    seen: list[str] = field(default_factory=list)

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(replace(s, reward=self.reward(prompt, s)) for s in samples)

    def reward(self, prompt: Prompt, sample: Sample) -> float:
        text = Characters().decode(sample.tokens[sample.origin != Origin.PROMPT])
        self.seen.append(text)
        if self.unjudged is not None and self.unjudged in text:
            return math.nan
        return float(sample.finish == Finish.STOP and text.endswith(prompt.answer))


@dataclass
class Policy:
    """Writes one fixed text on after anything."""

    text: str = "go"
    asked: list[tuple[np.ndarray, Sampling | None]] = field(default_factory=list)

    async def generate(
        self, tokens: np.ndarray, n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        self.asked.append((tokens, sampling))
        ids = np.append(Characters().spans(self.text)[0], EOS).astype(np.int32)
        return [Completion(ids, np.full(len(ids), -0.5, np.float32), Finish.STOP, (3, 4)) for _ in range(n)]

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise AssertionError("nobody asks the policy to score")

    async def topk(self, sequences: Sequence[np.ndarray], k: int) -> list[Any]:
        raise AssertionError("nobody asks the policy for its likeliest tokens")


@dataclass
class World:
    teacher: Teacher = field(default_factory=Teacher)
    verify: Ends = field(default_factory=Ends)
    policy: Policy = field(default_factory=Policy)
    reports: list[tuple[str, str]] = field(default_factory=list)
    sampling: Sampling | None = None

    @property
    def ask(self) -> Services:
        return Services(
            self.policy,
            self.verify,
            tokenizer=Characters(),
            writers={"first": self.teacher},
            report=lambda kind, text: self.reports.append((kind, text)),
            sampling=self.sampling,
        )


def asked(answer: str = "42", seed: int = 7) -> Prompt:
    return Prompt("p", np.array([BOS, 50], np.int32), answer, text="what is it?", seed=seed)


def wrote(text: str, finish: Finish = Finish.STOP, end: int = EOS, prompt: Prompt | None = None) -> Sample:
    ids = np.append(Characters().spans(text)[0], [end] * (finish == Finish.STOP)).astype(np.int32)
    logp = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return as_sample(prompt or asked(), Completion(ids, logp, finish, (1, 2)))


def judged(samples: Sequence[Sample], prompt: Prompt | None = None) -> Group:
    prompt = prompt or asked()
    return Group(prompt, asyncio.run(Ends()(prompt, samples)))


def guided(group: Group, world: World, guidance: Feedback | None = None, pct: float = 0.1) -> Group:
    return asyncio.run((guidance or Feedback())(group, world.ask, {PCT: pct}))


def written(sample: Sample) -> str:
    return Characters().decode(sample.tokens[sample.origin != Origin.PROMPT])


# ---- the schedule


def test_t1_linear_share_and_off_for_good() -> None:
    expected = [0.1, 0.094375, 0.08875, 0.083125, 0.0775, 0.071875, 0.06625, 0.060625, 0.055]
    teaching = Teaching()
    assert [teaching.pct(t) for t in range(9)] == pytest.approx(expected, abs=1e-9)
    assert [teaching.pct(t) for t in (16, 17, 1000)] == pytest.approx([0.01] * 3)
    assert [teaching.at(t) > 0 for t in range(60)] == [True] * 8 + [False] * 52
    knobs = [ThinkTuning().knobs(t, {})[PCT] for t in range(9)]
    assert knobs == pytest.approx([*expected[:8], 0.0], abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_every_schedule_falls_from_start_to_end(schedule: Any) -> None:
    teaching = Teaching(schedule=schedule, start=0.5, end=0.02, steps=30, epsilon=0.05)
    values = [teaching.pct(t) for t in range(20)]
    assert values[0] == pytest.approx(0.5)
    assert values[10:] == pytest.approx([0.02] * 10)
    assert values == sorted(values, reverse=True)
    on = [teaching.at(t) > 0 for t in range(20)]
    assert on == sorted(on, reverse=True)  # once off, off for good
    assert on[0]
    assert not on[10]


def test_a_constant_share_never_ends() -> None:
    assert Teaching(schedule="constant", start=0.3).at(10**6) == 0.3


@pytest.mark.parametrize(
    ("pct", "expected"), [(0.1, [0, 1, 1, 1, 1, 1]), (0.5, [0, 1, 1, 1, 2, 2]), (0.0, [0] * 6), (0.39, [0] + [1] * 5)]
)
def test_t2_how_many(pct: float, expected: list[int]) -> None:
    assert [how_many(e, pct) for e in range(6)] == expected
    assert how_many(8, 0.5) == 4


# ---- the loss


def test_t3_gamma() -> None:
    advantage = torch.tensor([-4.0, -2.0, -1.0, 0.0, 1.0, 4.0, 9.0])
    fixed = AAS().gamma(advantage)
    assert fixed.tolist() == pytest.approx([-0.001, -0.0005, -0.00025, 0, 0.00025, 0.001, 0.001], abs=1e-9)
    assert AAS().gamma(advantage, released=True).tolist() == pytest.approx([-0.001] * 7)


def of_teacher(logps: Sequence[float], advantage: float) -> Group:
    """A group of one answer, all of it a teacher's."""
    group = group_of([1.0], [len(logps)])
    sample = group.samples[0]
    wrote = sample.origin == Origin.POLICY
    guided = replace(
        sample,
        origin=np.where(wrote, Origin.TEACHER, sample.origin).astype(np.uint8),
        behavior_logp=np.full(len(sample.tokens), np.nan, np.float32),
    )
    return with_advantages(replace(group, samples=(guided,)), np.array([advantage]))


@pytest.mark.parametrize(
    ("advantage", "p", "fixed", "released"),
    [
        (1, 0.9, 0.999722, 1.001112),
        (1, 0.5, 0.9995, 1.002004),
        (1, 0.05, 0.995025, 1.020408),
        (1, 0.011, 0.977778, 1.1),
        (1, 0.005, 0.952381, 1.25),
        (1, 0.0011, 0.814815, 11.0),
        (1, 0.0005, 0.666667, 1.0001),
        (-1, 0.5, 1.0005, 1.002004),
        (-1, 0.05, 1.005025, 1.020408),
        (-1, 0.011, 1.023256, 1.1),
        (-1, 0.005, 1.0, 1.0),  # the exception: an ordinary policy term, ρ = π/sg[π]
        (-1, 0.0005, 1.0, 1.0),
    ],
)
def test_t4_weight_of_a_teachers_token(advantage: float, p: float, fixed: float, released: float) -> None:
    """Value −A·w and gradient −A·w, through pack and loss. The inverted clamp is in compat only."""
    for algorithm, w in ((ThinkTuning(), fixed), (ThinkTuning(official_compat=True), released)):
        value, gradient = step_loss(algorithm, [of_teacher([p], advantage)], [[math.log(p)]])
        assert value == pytest.approx(-advantage * w, rel=2e-4 if p < 0.002 else 1e-5)
        assert gradient[0][0] == pytest.approx(-advantage * w, rel=2e-4 if p < 0.002 else 1e-5)


def test_a_good_token_weighs_less_and_a_bad_one_more_unless_released() -> None:
    logp = torch.log(torch.tensor([0.3, 0.3]))
    advantage = torch.tensor([2.0, -2.0])
    good, bad = AAS().weight(logp, advantage).tolist()
    assert good < 1 < bad
    assert min(AAS().weight(logp, advantage, released=True).tolist()) > 1


@pytest.mark.parametrize("compat", [False, True])
def test_no_probability_makes_nan(compat: bool) -> None:
    """p = 0, p = .001 (d = 0 in compat), p = 1."""
    for p in (-300.0, math.log(0.001), 0.0):
        for advantage in (-1.0, 0.0, 1.0):
            group = of_teacher([p], advantage)
            value, gradient = step_loss(ThinkTuning(official_compat=compat), [group], [[p]])
            assert np.isfinite(value)
            assert np.isfinite(gradient[0][0])


def test_t6_loss_of_a_spliced_row_beside_a_plain_one() -> None:
    a = [1.095443, -0.730295]
    teacher, plain = of_teacher([0.9, 0.5, 0.05], a[0]), group_of([0.0], [2], [[-1.0, -2.0]])
    group = replace(teacher, samples=(*teacher.samples, *with_advantages(plain, np.array([a[1]])).samples))
    logps = [np.log([0.9, 0.5, 0.05]).tolist(), [-1.0, -2.0]]
    fixed, gradient = step_loss(ThinkTuning(), [group], logps)
    assert fixed == pytest.approx(-0.363768, abs=2e-6)
    assert [5 * g for g in gradient[0]] == pytest.approx([-1.095110, -1.094843, -1.089476], abs=5e-6)
    assert [5 * g for g in gradient[1]] == pytest.approx([0.730295] * 2, abs=5e-6)
    released, gradient = step_loss(ThinkTuning(official_compat=True), [group], logps)
    assert released == pytest.approx(-0.370302, abs=2e-6)
    assert [5 * g for g in gradient[0]] == pytest.approx([-1.096662, -1.097638, -1.117799], abs=5e-6)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("rewards", [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0)])
def test_in_a_group_without_contrast_a_teachers_row_teaches_nothing(compat: bool, rewards: tuple[float, float]) -> None:
    """§3.8: std(r) = 0 is Â = 0, whatever γ(0) and w are; also where p ≈ 0. Control: with contrast it teaches."""
    [teachers], [own] = of_teacher([0.9, 0.0005], 0.0).samples, group_of([0.0], [2], [[-1.0, -2.0]]).samples
    samples = tuple(replace(s, reward=r) for s, r in zip((teachers, own), rewards, strict=True))
    algorithm = ThinkTuning(official_compat=compat)
    group = algorithm.credit(Group(prompt_of(), samples))
    value, gradient = step_loss(algorithm, [group], [np.log([0.9, 0.0005]).tolist(), [-1.0, -2.0]])
    flat = [g for row in gradient for g in row]
    if rewards[0] == rewards[1]:
        assert (value, flat) == (0.0, [0.0] * 4)
    else:
        assert min(abs(g) for g in flat) > 0


def test_the_dual_clip_is_on_without_guidance_too() -> None:
    group = with_advantages(group_of([0.0], [1], [[-3.0]]), np.array([-1.0]))
    assert step_loss(ThinkTuning(), [group], [[0.0]])[0] == pytest.approx(3.0)  # ρ = e³


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    norm=st.sampled_from(["token", "sequence"]),
    beta=st.sampled_from([0.0, 0.1]),
    kl=st.sampled_from(["k1", "k2"]),
    correction=st.sampled_from(["none", "tis"]),
    entropy=st.sampled_from([0.0, 0.01]),
)
def test_after_switch_off_it_is_grpo(
    seed: int, norm: Any, beta: float, kl: Any, correction: Any, entropy: float
) -> None:
    tuning = ThinkTuning(norm=norm, beta=beta, kl=kl, correction=correction, entropy=entropy)
    own = {f.name: getattr(tuning, f.name) for f in fields(GRPO) if f.name not in ("name", "guidance")}
    grpo = GRPO(**own)
    groups, logps = random_step(seed)
    world = World()
    after = [asyncio.run(tuning.guidance(g, world.ask, tuning.knobs(8, {}))) for g in groups]
    assert all(a is g for a, g in zip(after, groups, strict=True))
    assert world.teacher.heard == []
    a = step_loss(tuning, [tuning.credit(g) for g in after], logps)
    b = step_loss(grpo, [grpo.credit(g) for g in groups], logps)
    assert a == b


def test_before_switch_off_it_is_not_grpo() -> None:
    """Negative control of the property above."""
    world, prompt = World(), asked("ph")
    group = judged([wrote("a", prompt=prompt), wrote("b", prompt=prompt)], prompt)
    tuning = ThinkTuning()
    after = asyncio.run(tuning.guidance(group, world.ask, tuning.knobs(7, {})))
    assert [s.guided for s in after.samples].count(True) == 1


def random_step(seed: int) -> tuple[list[Group], list[list[float]]]:
    rng = np.random.default_rng(seed)
    groups, logps = [], []
    for g in range(2):
        lengths = rng.integers(1, 6, 4).tolist()
        own = [(-rng.exponential(1.0, n)).tolist() for n in lengths]
        behavior = [np.minimum(np.array(p) + rng.normal(0, 0.3, len(p)), 0).tolist() for p in own]
        group = group_of(rng.integers(0, 2, 4).astype(float).tolist(), lengths, behavior)
        samples = tuple(
            replace(
                s,
                tokens=(s.tokens + np.where(s.origin == Origin.POLICY, 100 * (4 * g + i), 0)).astype(np.int32),
                reference_logp=np.where(s.origin == Origin.POLICY, -rng.exponential(1.0, len(s.tokens)), np.nan).astype(
                    np.float32
                ),
            )
            for i, s in enumerate(group.samples)
        )
        groups.append(replace(group, samples=samples))
        logps += own
    return groups, logps


# ---- selection and splice


def test_t5_advantages_after_a_row_flips() -> None:
    """The mean and deviation are those of the rewards after the splice."""

    def advantages(group: Group) -> list[float]:
        return [float(s.advantage[-1]) for s in ThinkTuning().credit(group).samples if s.advantage is not None]

    texts = ["a", "b", "x42", "c", "d"]
    group = judged([wrote(t) for t in texts])
    low, high = -0.447213, 1.78885
    assert advantages(group) == pytest.approx([low, low, high, low, low], abs=1e-5)
    flips = World(Teacher(good("so 42")))
    wrong = judged([wrote(t) for t in ("a", "b", "c", "d", "e")])
    after = guided(wrong, flips)
    (row,) = [i for i, s in enumerate(after.samples) if s.guided]
    expected = [low] * 5
    expected[row] = high
    assert advantages(after) == pytest.approx(expected, abs=1e-5)
    # one of five is right already, and a second one becomes right: 1.095443 and −.730295
    seed = next(s for s in range(50) if _row_of(replace(group, prompt=asked(seed=s))) == 3)
    after = guided(replace(group, prompt=asked(seed=seed)), flips)
    assert advantages(after) == pytest.approx([-0.730295] * 2 + [1.095443] * 2 + [-0.730295], abs=1e-5)


def _row_of(group: Group) -> int:
    return Feedback().chosen(group, Characters(), 0.1)[0][0]


def test_t7_splice_on_token_ids() -> None:
    prompt = asked("de")
    group = judged([wrote("ab", prompt=prompt)], prompt)
    world = World(Teacher("<opinion>correct</opinion><reason>c</reason><phrase>de</phrase>"))
    row = guided(group, world, Feedback(separator="|")).samples[0]
    a, b, c, d, e, s = (ord(ch) for ch in "abcde|")
    assert row.tokens.tolist() == [BOS, 50, a, b, s, c, s, d, e, EOS]
    p, o, t = Origin.PROMPT, Origin.POLICY, Origin.TEACHER
    assert row.origin.tolist() == [p, p, o, o, t, t, t, t, t, t]
    assert row.behavior_logp[2:4].tolist() == [-1.0, -2.0]
    assert np.isnan(np.delete(row.behavior_logp, [2, 3])).all()
    assert row.versions == (1, 2)
    assert row.finish == Finish.STOP
    assert row.reward == 1.0
    whole = guided(group, world, Feedback(separator="|", mask_scope="row")).samples[0]
    assert whole.tokens.tolist() == row.tokens.tolist()
    assert whole.origin.tolist() == [p, p] + [t] * 8
    assert np.isnan(whole.behavior_logp).all()


def test_the_default_separator_is_a_blank_line() -> None:
    group = guided(judged([wrote("own")]), World())
    assert written(group.samples[0]) == "own\n\nr\n\nph"


def test_compat_sets_what_it_stands_for() -> None:
    tuning = ThinkTuning(official_compat=True, guidance=Feedback(max_tokens=9))
    assert (tuning.guidance.mask_scope, tuning.guidance.over_long) == ("row", "cut")
    assert ThinkTuning(official_compat=True).problems() == []
    assert (ThinkTuning().guidance.mask_scope, ThinkTuning().guidance.over_long) == ("guide_only", "leave")


def test_rows_are_drawn_from_the_prompts_seed() -> None:
    samples = [wrote(f"row{i}") for i in range(8)]

    def chosen(seed: int, pct: float = 0.5) -> list[int]:
        group = judged(samples, asked(seed=seed))
        return [i for i, s in enumerate(guided(group, World(), pct=pct).samples) if s.guided]

    assert chosen(3) == chosen(3)
    assert len(chosen(3)) == 4
    counts = np.bincount([i for seed in range(200) for i in chosen(seed, 0.1)], minlength=8)
    assert counts.sum() == 200
    assert counts.min() > 8  # uniform: 25 each on average


def test_right_answers_are_eligible_too() -> None:
    group = judged([wrote("x42")])
    assert group.samples[0].reward == 1.0
    after = guided(group, World())  # the teacher is wrong about it
    assert after.samples[0].guided
    assert after.samples[0].reward == 0.0
    assert after.replaced == group.samples  # the student's own answer still counts in curves and pass rates
    assert [s.reward for s in after.own] == [1.0]


def test_truncated_answers_are_not_eligible() -> None:
    cut, aborted = wrote("a", Finish.LENGTH), wrote("b", Finish.ABORTED)
    twice = wrote("a¶b")
    assert [is_finished(s, EOS) for s in (cut, aborted, twice, wrote(""), wrote("a"))] == [False] * 3 + [True] * 2
    after = guided(judged([cut, wrote("own"), aborted, twice]), World(), pct=1.0)
    assert [s.guided for s in after.samples] == [False, True, False, False]


def test_without_an_eligible_row_nobody_is_asked() -> None:
    world, group = World(), judged([wrote("a", Finish.LENGTH)])
    assert guided(group, world) is group
    assert guided(replace(group, samples=()), world).samples == ()
    assert world.teacher.heard == []


def test_another_end_token_stays_at_the_end() -> None:
    """A model with several end tokens: the one that ended the answer is put back."""
    row = guided(judged([wrote("own", end=OTHER_EOS)]), World()).samples[0]
    assert row.tokens[-1] == OTHER_EOS
    assert written(row) == "own\n\nr\n\nph"
    assert not is_finished(wrote("a¶b", end=OTHER_EOS), EOS)


# ---- the teacher


def test_what_the_teacher_is_told() -> None:
    prompt = asked(answer="CANARY-ANSWER")
    world = World()
    guided(judged([wrote("my {response} draft", prompt=prompt)], prompt), world)
    (messages,) = world.teacher.heard
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 4 + ["user"]
    assert messages[-1]["content"] == "Question: what is it?\n\nResponse: my {response} draft"
    assert "CANARY" not in str(messages)
    kinds = ["self-agreement", "self-conflict", "self-consultation", "self-critic"]
    assert [e.kind for e in EXAMPLES] == kinds
    assert [e.opinion for e in EXAMPLES] == ["correct", "incorrect", "incorrect", "correct"]
    assert all(parse(m["content"], Tags()) for m in messages if m["role"] == "assistant")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I think it is wrong.",
        "<opinion>correct</opinion><reason>r</reason>",
        "<opinion>perhaps</opinion><reason>r</reason><phrase>p</phrase>",
        "<reason>r</reason><opinion>correct</opinion><phrase>p</phrase>",
        "<opinion>correct</opinion><reason>r</reason><phrase>p",
        "<opinion>correct</opinion><reason>r</reason><phrase>p</phrase> bye",
        "Sure! <opinion>correct</opinion><reason>r</reason><phrase>p</phrase>",
        "<opinion>correct</opinion><reason>r</reason><reason>s</reason><phrase>p</phrase>",
        "<opinion>correct</opinion><reason>r</reason><phrase>p</phrase><phrase>p</phrase>",
        "<opinion>correct</opinion><reason> </reason><phrase>p</phrase>",
        "<opinion>correct</opinion><reason>r</reason><phrase></phrase>",
    ],
)
def test_feedback_that_is_not_of_the_form_changes_nothing(text: str) -> None:
    world, group = World(Teacher(text)), judged([wrote("own")])
    assert guided(group, world) is group
    (report,) = world.reports
    assert report[0] == "feedback"
    assert "not of the asked form" in report[1]
    assert world.verify.seen == []  # nobody judges what did not change


def test_feedback_that_did_not_end_changes_nothing() -> None:
    world, group = World(Teacher(finish=Finish.LENGTH)), judged([wrote("own")])
    assert guided(group, world) is group
    assert "did not come to its end" in world.reports[0][1]


def test_space_around_the_blocks_is_allowed() -> None:
    remark = parse(f"\n {GOOD.replace('>r<', '> r <')} \n", Tags())
    assert remark is not None
    assert (remark.opinion, remark.reason, remark.phrase) == ("incorrect", "r", "ph")


@pytest.mark.parametrize(
    ("beyond", "text"),
    [(0, "own\n\nr\n\nph"), (1, "own\n\nr"), (len("\n<phrase>ph</phrase>"), "own\n\nr"), (len(GOOD) - 20, "own")],
)
def test_long_feedback_is_cut_and_loses_its_phrase(beyond: int, text: str) -> None:
    """512 tokens by default; a phrase without its end is left out, and without the reason's end nothing is used."""
    world = World()
    row = guided(judged([wrote("own")]), world, Feedback(max_feedback_tokens=len(GOOD) - beyond)).samples[0]
    assert written(row) == text
    assert row.guided == (text != "own")
    assert bool(world.reports) == (text == "own")


def test_an_over_long_row_stays_the_students() -> None:
    group = judged([wrote("own")])  # 3 + 5 + 2 tokens and the end token: 3 + 2+1 + 2+2 + 1 = 11
    world = World()
    assert guided(group, world, Feedback(max_tokens=10)) is group
    assert "too long" in world.reports[0][1]
    assert guided(group, World(), Feedback(max_tokens=11)).samples[0].guided


def test_released_code_cuts_an_over_long_row_and_so_its_end() -> None:
    prompt = asked("ph")
    world, group = World(), judged([wrote("own", prompt=prompt)], prompt)
    row = guided(group, world, Feedback(max_tokens=10, over_long="cut")).samples[0]
    assert row.finish == Finish.LENGTH
    assert row.answer_tokens == 10
    assert row.tokens[-1] == ord("h")
    assert row.reward == 0.0


def test_a_row_that_nobody_can_judge_stays_the_students() -> None:
    world = World(verify=Ends(unjudged="ph"))
    group = judged([wrote("own")])
    after = guided(group, world)
    assert after.samples == group.samples
    assert "judge" in world.reports[0][1]


@pytest.mark.parametrize(("phrase", "why"), [("a¶b", "end token"), ("ABC", "no tokens")])
def test_text_that_the_policy_cannot_say_changes_nothing(phrase: str, why: str) -> None:
    world = World(Teacher(good(phrase)))
    group = judged([wrote("own")])
    assert guided(group, world) is group
    assert why in world.reports[0][1]


@pytest.mark.parametrize("compat", [False, True])
def test_a_wrong_teacher_makes_its_own_tokens_unlikelier(compat: bool) -> None:
    """And in compat, by the same formula, the student's own beginning."""
    world = World(Teacher(good("it is 41")))
    group = judged([wrote("so 42"), wrote("so 42")])
    tuning = ThinkTuning(official_compat=compat)
    after = asyncio.run(tuning.guidance(group, world.ask, tuning.knobs(0, {})))
    credited = tuning.credit(after)
    (row,) = [s for s in credited.samples if s.guided]
    assert row.reward == 0.0
    assert row.advantage is not None
    teachers = row.origin == Origin.TEACHER
    assert (row.advantage[teachers] < 0).all()
    begins = int(np.flatnonzero(row.origin != Origin.PROMPT)[0])
    assert bool(teachers[begins]) == compat
    logps = [[-0.7] * s.answer_tokens for s in credited.samples]
    _, gradient = step_loss(tuning, [credited], logps)
    place = [s is row for s in credited.samples].index(True)
    tail = gradient[place][-int(teachers.sum()) :]
    assert min(tail) > 0  # descending makes them less likely


def test_a_lost_writer_goes_to_the_loop() -> None:
    world = World(Teacher(lost=True))
    with pytest.raises(WorkerLost):
        guided(judged([wrote("own"), wrote("two")]), world, pct=1.0)
    assert world.reports == []


def test_one_lost_writer_ends_what_the_others_were_asked() -> None:
    started, ended = [], []

    class Slow(Teacher):
        async def write(self, messages: Sequence[Mapping[str, str]], seed: int = 0) -> Written:
            started.append(seed)
            if len(started) == 2:
                raise WorkerLost("on purpose")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(seed)
                raise
            raise AssertionError("not reached")

    with pytest.raises(WorkerLost):
        guided(judged([wrote("own"), wrote("two")]), World(Slow()), pct=1.0)
    assert len(ended) == 1


def test_the_teacher_is_the_named_one_or_the_first() -> None:
    a, b = Teacher(), Teacher()
    ask = replace(World().ask, writers={"a": a, "b": b})
    group = judged([wrote("own")])
    asyncio.run(Feedback()(group, ask, {PCT: 0.1}))
    asyncio.run(Feedback(teacher="b")(group, ask, {PCT: 0.1}))
    assert (len(a.heard), len(b.heard)) == (1, 1)
    assert a.seeds == b.seeds
    with pytest.raises(ConfigError, match=r"no teacher named `c` writes[\s\S]*a, b"):
        asyncio.run(Feedback(teacher="c")(group, ask, {PCT: 0.1}))
    with pytest.raises(ConfigError, match="no teacher writes"):
        asyncio.run(Feedback()(group, replace(ask, writers={}), {PCT: 0.1}))


def test_worked_form_asks_the_question_itself() -> None:
    prompt = replace(asked("42"), messages=({"role": "user", "content": "say it"},))
    world = World(Teacher(" 41+1=42 \n"))
    row = guided(judged([wrote("own")], prompt), world, Feedback(form="worked")).samples[0]
    assert world.teacher.heard == [prompt.messages]
    assert written(row) == "own\n\n41+1=42"
    assert row.reward == 1.0
    for text, limit in (("  ", 512), ("41+1=42", 6)):
        world, group = World(Teacher(text)), judged([wrote("own")], prompt)
        assert guided(group, world, Feedback(form="worked", max_feedback_tokens=limit)) is group
        assert len(world.reports) == 1


def test_the_student_may_write_on_after_the_feedback() -> None:
    how = Sampling(20, temperature=0.7, stop_tokens=(EOS, OTHER_EOS))
    world = World(policy=Policy(" so 42"), sampling=how)
    row = guided(judged([wrote("own")]), world, Feedback(continue_after=True)).samples[0]
    assert written(row) == "own\n\nr\n\nph so 42"
    assert row.reward == 1.0
    o, t = Origin.POLICY, Origin.TEACHER
    assert row.origin[2:].tolist() == [o] * 3 + [t] * 7 + [o] * 7
    assert np.isfinite(row.behavior_logp).tolist() == [v == o for v in row.origin.tolist()]
    assert row.versions == (1, 4)
    ((start, sampling),) = world.policy.asked
    assert start.tolist() == row.tokens[:-7].tolist()
    assert sampling == replace(how, max_tokens=10)  # what is left of 20


def test_nothing_is_left_to_write_on() -> None:
    group = judged([wrote("own")])
    for guidance in (Feedback(continue_after=True), Feedback(continue_after=True, max_tokens=10)):
        world = World(sampling=Sampling(10))
        assert guided(group, world, guidance) is group
        assert world.policy.asked == []
        assert "too long" in world.reports[0][1]
    with pytest.raises(ValueError, match=r"Services\.sampling"):
        guided(group, World(), Feedback(continue_after=True))


# ---- the table of prompts, and what is contradictory


def test_a_recipe_may_replace_the_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(
        'system: Say it.\nturn: "Q {question} A {response}"\n'
        "tags: {opinion: o, reason: why, phrase: then, opinions: [gut, falsch]}\nexamples: []\n"
    )
    world = World(Teacher("<o>falsch</o><why>w</why><then>t</then>"))
    guidance = Feedback(prompts=str(path))
    assert guidance.problems() == []
    row = guided(judged([wrote("own")]), world, guidance).samples[0]
    assert written(row) == "own\n\nw\n\nt"
    assert world.teacher.heard == [
        [{"role": "system", "content": "Say it."}, {"role": "user", "content": "Q what is it? A own"}]
    ]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("- a", "no section"),
        ("sistem: x", "unknown keys: sistem"),
        ("turn: no places", "turn has no {question}"),
        ("tags: {reason: opinion}", "three different names"),
        ("tags: {opinions: []}", "tags.opinions"),
        ("examples: [{kind: a}]", r"examples\[0\] lacks question"),
        (
            "examples: [{kind: a, question: q, response: r, opinion: maybe, reason: x, phrase: y}]",
            "not of the form",
        ),
        ("system: 3", "system is no text"),
        ("{", "line 1: "),
    ],
)
def test_a_wrong_table_is_one_clear_error(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=what):
        load(str(path))
    (problem,) = ThinkTuning(guidance=Feedback(prompts=str(path))).problems()
    assert problem.startswith("guidance.prompts=")


def test_contradictions_are_named() -> None:
    def first(**changes: Any) -> str:
        return ThinkTuning(**changes).problems()[0]

    assert ThinkTuning().problems() == []
    assert "guidance.prompts=nowhere.yaml" in first(guidance=Feedback(prompts="nowhere.yaml"))
    assert "guidance.max_feedback_tokens=0" in first(guidance=Feedback(max_feedback_tokens=0))
    assert "guidance.max_tokens=0" in first(guidance=Feedback(max_tokens=0))
    assert "guidance.over_long=cut" in first(guidance=Feedback(over_long="cut"))
    assert "guidance.mask_scope=row" in first(guidance=Feedback(continue_after=True), official_compat=True)
    assert "teaching.start=0.05 is at most" in first(teaching=Teaching(start=0.05))
    assert "teaching.end=0.2" in first(teaching=Teaching(end=0.2))
    assert "teaching.steps=0" in first(teaching=Teaching(steps=0))
    assert "aas.advantage_min" in first(aas=AAS(advantage_min=4.0))
    assert "dual_clip" in first(dual_clip=1.0)


def test_is_an_algorithm_that_needs_a_teachers_text() -> None:
    assert isinstance(ThinkTuning(), Algorithm)
    assert isinstance(Feedback(), Guidance)
    assert ThinkTuning().needs == {Signal.TEACHER_TEXT}
    assert ThinkTuning(beta=0.1).needs == {Signal.TEACHER_TEXT, Signal.REFERENCE}
    assert ThinkTuning().rollout.samples == 5
