"""What the papers claim, and by which rule a benchmark's numbers decide. Pure functions of numbers by method and seed.

Every comparison is paired by seed: d_s = metric(A, seed s) − metric(B, seed s), with Student's 95 % interval of its
mean. The seeds differ in the order of prompts and in what was sampled; student, teachers and held-out problems are the
same for all. About one comparison in twenty is expected to look clear by chance.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Results = Mapping[str, Mapping[int, Mapping[str, float]]]  # method → seed → metric → value; NaN: unknown
Word = Literal["reproduced", "not reproduced", "cannot be tested at this scale", "not yet known"]

FEWEST_SEEDS = 3
CEILING = 0.98  # of a pass rate: two methods above it cannot be told apart
LEVEL = 0.05  # pass rates whose difference lies within ± this (whole interval) are called level
RARELY = 0.10  # a student right less often than this alone "rarely succeeds"
SAME_LENGTH = 0.05  # mean lengths within this share of each other are one length
T975 = (  # 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; NaN for what nothing is known of, ends NaN with one value."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Student's t; NaN values are left out. Beyond 30 degrees of freedom the quantile of 30: a little too wide."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = T975[min(len(known) - 1, len(T975)) - 1] * statistics.stdev(known) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half, len(known))


def values(results: Results, method: str, metric: str) -> dict[int, float]:
    """By seed, without unknown ones."""
    found = {seed: row.get(metric, math.nan) for seed, row in results.get(method, {}).items()}
    return {seed: value for seed, value in sorted(found.items()) if not math.isnan(value)}


def paired(results: Results, a: str, b: str, metric: str) -> Interval:
    """Of A − B, over the seeds that both have."""
    left, right = values(results, a, metric), values(results, b, metric)
    return interval([left[seed] - right[seed] for seed in left if seed in right])


@dataclass(frozen=True)
class Verdict:
    word: Word
    why: str  # the numbers that decided


Rule = Callable[[Results], Verdict]


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper; `rule` in words, and as a function."""

    paper: str
    text: str
    rule: str
    decide: Rule


def points(d: Interval) -> str:
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {d.count} seeds"


def too_few(d: Interval) -> Verdict | None:
    if d.count >= FEWEST_SEEDS:
        return None
    return Verdict("not yet known", f"{d.count} of at least {FEWEST_SEEDS} seeds")


def of_difference(d: Interval) -> Verdict:
    """A is better: the interval of A − B lies above 0."""
    if d.low > 0:
        return Verdict("reproduced", points(d))
    if d.high < 0:
        return Verdict("not reproduced", f"the opposite: {points(d)}")
    return Verdict("not reproduced", f"no difference beyond noise: {points(d)}")


def better(a: str, b: str, metric: str = "pass@1") -> Rule:
    def decide(results: Results) -> Verdict:
        d = paired(results, a, b, metric)
        if (few := too_few(d)) is not None:
            return few
        means = [interval(list(values(results, m, metric).values())).mean for m in (a, b)]
        if min(means) >= CEILING:
            return Verdict("cannot be tested at this scale", f"both at the ceiling: {means[0]:.3f} and {means[1]:.3f}")
        return of_difference(d)

    return decide


def where_it_fails(rule: Rule, baseline: str = "student") -> Rule:
    """The claim is about a student that rarely succeeds: first see that this one does."""

    def decide(results: Results) -> Verdict:
        alone = interval(list(values(results, baseline, "pass@1").values())).mean
        if alone >= RARELY:
            why = f"alone the student is right on {alone:.3f}, not rarely"
            return Verdict("cannot be tested at this scale", why)
        return rule(results)

    return decide


def level(a: str, b: str, metric: str = "pass@1") -> Rule:
    def decide(results: Results) -> Verdict:
        d = paired(results, a, b, metric)
        if (few := too_few(d)) is not None:
            return few
        within = d.low >= -LEVEL and d.high <= LEVEL
        return Verdict("reproduced" if within else "not reproduced", points(d))

    return decide


def longest(a: str, others: Sequence[str]) -> Rule:
    """A's answers are longer than those of each of the others."""

    def decide(results: Results) -> Verdict:
        differences = {b: paired(results, a, b, "length") for b in others}
        least = min(differences.values(), key=lambda d: d.count)
        if (few := too_few(least)) is not None:
            return few
        means = {m: interval(list(values(results, m, "length").values())).mean for m in (a, *others)}
        told = ", ".join(f"{m} {v:.1f}" for m, v in means.items())
        if max(means.values()) - min(means.values()) < SAME_LENGTH * min(means.values()):
            return Verdict("cannot be tested at this scale", f"the task fixes the length; tokens: {told}")
        longer = all(d.low > 0 for d in differences.values())
        return Verdict("reproduced" if longer else "not reproduced", f"tokens: {told}")

    return decide


def stays(a: str, b: str) -> Rule:
    """What a teacher gave is still there long after it was switched off."""

    def decide(results: Results) -> Verdict:
        then, late = (paired(results, a, b, metric) for metric in ("right_after_off", "right_late"))
        if (few := too_few(then)) is not None:
            return few
        told = f"right after switch-off {points(then)}; in the last steps {points(late)}"
        if not then.low > 0:
            return Verdict("cannot be tested at this scale", f"there is no clear benefit that could stay: {told}")
        return Verdict("reproduced" if late.low > 0 else "not reproduced", told)

    return decide


ABOVE = "the 95 % interval of the paired difference in held-out pass@1 lies above 0"
CANNOT = f"; cannot be tested if both are at least {CEILING}"
FAILS = f"; cannot be tested if the student alone reaches {RARELY}"


def _above(paper: str, text: str, a: str, b: str) -> Claim:
    return Claim(paper, text, f"{a} − {b}: {ABOVE}{CANNOT}", better(a, b))


CLAIMS: tuple[Claim, ...] = (
    _above("KDRL", "Joint KD and RL beats RL alone (strong teacher).", "kdrl", "grpo"),
    _above("KDRL", "Joint KD and RL beats on-policy distillation alone (strong teacher).", "kdrl", "kd-rkl"),
    _above("KDRL", "Joint KD and RL beats SFT on the teacher's traces.", "kdrl", "sft"),
    _above("KDRL", "The same against RL alone, with a teacher that errs (peer).", "kdrl-peer", "grpo"),
    _above("KDRL", "The same against distillation alone, with a teacher that errs.", "kdrl-peer", "kd-rkl-peer"),
    _above("KDRL", "An annealed β beats a constant one.", "kdrl-annealed", "kdrl"),
    _above("KDRL, our reading", "Distilling all answers beats distilling the wrong ones only.", "kdrl", "kdrl-wrong"),
    _above("KDRL, our reading", "Distilling all answers beats distilling failed groups only.", "kdrl", "kdrl-failed"),
    Claim(
        "KDRL",
        "Distillation alone inflates the length of answers most.",
        "kd-rkl − each of grpo, sft, kdrl: the interval of the paired difference in answer length lies above 0; cannot "
        f"be tested if the mean lengths lie within {SAME_LENGTH:.0%} of each other",
        longest("kd-rkl", ("grpo", "sft", "kdrl")),
    ),
    Claim(
        "AMPO",
        "Several teachers' traces on demand beat RL alone where the student fails.",
        f"ampo − grpo: {ABOVE}{CANNOT}{FAILS}",
        where_it_fails(better("ampo", "grpo")),
    ),
    Claim(
        "AMPO",
        "It does so in pass@k too (here k = 8).",
        "ampo − grpo: the interval of the paired difference in held-out pass@8 lies above 0" + CANNOT,
        better("ampo", "grpo", "pass@8"),
    ),
    _above("AMPO", "Several teachers beat one.", "ampo", "ampo-one"),
    Claim(
        "AMPO",
        "Peers' traces on demand are level with LUFFY's traces of a stronger teacher, in domain (40.4 and 41.0 there).",
        f"ampo − luffy: the interval of the paired difference in held-out pass@1 lies within ±{LEVEL}",
        level("ampo", "luffy"),
    ),
    Claim(
        "AMPO",
        "Out of domain it generalises better than LUFFY and GRPO.",
        "none: there is no second domain",
        lambda _: Verdict("cannot be tested at this scale", "a student of 0.86 M parameters knows one task"),
    ),
    _above("AMPO, LUFFY", "SFT followed by RL beats RL alone (here at equal samples).", "sft-grpo", "grpo"),
    Claim(
        "LUFFY",
        "A worked answer in each group beats RL alone where the student rarely succeeds.",
        f"luffy − grpo: {ABOVE}{CANNOT}{FAILS}",
        where_it_fails(better("luffy", "grpo")),
    ),
    _above("ThinkTuning", "A peer's feedback beats RL alone.", "thinktuning", "grpo"),
    Claim(
        "ThinkTuning",
        "What it gains stays after the teacher is switched off.",
        "thinktuning − grpo in the share of right own answers in training: the interval lies above 0 in the first 8 "
        "steps after switch-off (else cannot be tested) and in the last 8 steps",
        stays("thinktuning", "grpo"),
    ),
)
