"""benchmarks/results/papers.md: what the runs found, and one sentence for each claim of the papers."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from papers_claims import CLAIMS, T975, Claim, Interval, Results, Verdict, interval, values
from papers_methods import (
    ABOUT_AS_GOOD,
    CARRIES,
    GROUPS,
    HOLDOUT,
    HOLDOUT_SAMPLES,
    MODELS,
    PILOT_SEED,
    SAMPLES,
    STEPS,
    TRAIN,
    TRIED,
    Method,
    Rates,
)

RATES = ("pass@1", "greedy", "pass@8")
UNKNOWN = "–"


def with_ends(found: Interval, digits: int = 3) -> str:
    """`0.512 ± 0.031`; without ± for a single value, a dash for none."""
    if math.isnan(found.mean):
        return UNKNOWN
    if math.isnan(found.low):
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.mean - found.low:.{digits}f}"


def cell(results: Results, method: str, metric: str, digits: int = 3) -> str:
    return with_ends(interval(list(values(results, method, metric).values())), digits)


def table(methods: Mapping[str, Method], results: Results) -> list[str]:
    lines = [
        "| method | seeds | pass@1 | greedy | pass@8 | tokens an answer | all-wrong groups, first → last 5 steps "
        "| guided samples | seconds |",
        "|---" * 9 + "|",
    ]
    for key, method in methods.items():
        seeds = len(results.get(key, {}))
        if not seeds:
            lines.append(f"| {method.label} | 0 " + f"| {UNKNOWN} " * 7 + "|")
            continue
        rates = [cell(results, key, metric) for metric in RATES]
        wrong = [mean(results, key, f"all_wrong_{end}", 2) for end in ("start", "end")]
        failed = UNKNOWN if set(wrong) == {UNKNOWN} else " → ".join(wrong)
        rest = [cell(results, key, "length", 1), failed, mean(results, key, "guided", 3), mean(results, key, "seconds")]
        lines.append(f"| {method.label} | {seeds} | " + " | ".join([*rates, *rest]) + " |")
    return lines


def mean(results: Results, key: str, metric: str, digits: int = 0) -> str:
    found = interval(list(values(results, key, metric).values())).mean
    return UNKNOWN if math.isnan(found) else f"{found:.{digits}f}"


def models(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = ["| model | drops a carry | pass@1 | greedy | pass@8 | |", "|---" * 6 + "|"]
    for made in MODELS:
        rates = [f"{found[made.name][metric]:.3f}" if made.name in found else UNKNOWN for metric in RATES]
        lines.append(f"| {made.name} | {made.forgets:g} | " + " | ".join(rates) + f" | {made.about} |")
    return lines


def verdicts(results: Results, claims: Sequence[Claim] = CLAIMS) -> list[tuple[Claim, Verdict]]:
    return [(claim, claim.decide(results)) for claim in claims]


def claims_table(decided: Sequence[tuple[Claim, Verdict]]) -> list[str]:
    lines = ["| paper | claim | here | numbers | rule |", "|---" * 5 + "|"]
    for claim, verdict in decided:
        lines.append(f"| {claim.paper} | {claim.text} | **{verdict.word}** | {verdict.why} | {claim.rule} |")
    return lines


def pilot_table(rows: Sequence[Mapping[str, Any]], rates: Rates) -> list[str]:
    lines = ["| method | setting | value | pass@1 | greedy | pass@8 | |", "|---" * 7 + "|"]
    for row in rows:
        key, setting, _ = TRIED[row["rate"]]
        shown = " | ".join(f"{row[metric]:.3f}" for metric in RATES)
        taken = "**taken**" if getattr(rates, row["rate"]) == row["value"] else ""
        lines.append(f"| {key} | {setting} | {row['value']:g} | {shown} | {taken} |")
    return lines


def page(
    methods: Mapping[str, Method],
    results: Results,
    found: Mapping[str, Mapping[str, float]],
    traces: Mapping[str, Mapping[str, float]],
    pilot: Sequence[Mapping[str, Any]],
    rates: Rates,
    about: Mapping[str, Any],
    commands: Sequence[Sequence[str]],
) -> str:
    """The whole file. `results` has the student beside the methods, the same at every seed."""
    done = sum(len(results.get(key, {})) for key in methods)
    wanted = len(methods) * about["seeds"]
    lines = ["# The papers' claims on a small scale", "", *introduction(about), ""]
    if done < wanted:
        lines += [f"**Partial: {done} of {wanted} runs.** The same command goes on.", ""]
    if about["failed"]:
        lines += ["**Failed:** " + "; ".join(about["failed"]), ""]
    lines += ["## Models", "", *models(found), "", traces_line(traces), ""]
    lines += ["## Methods", "", method_notes(), "", *table(methods, results), ""]
    lines += ["## Claims", "", claims_note(), "", *claims_table(verdicts(results)), ""]
    lines += ["## Settings", "", settings_note(), "", *pilot_table(pilot, rates), ""]
    lines += ["## One run by hand", "", "Models and traces first (`--only-models` makes both), then, for seed 0:", ""]
    lines += ["```", *(shlex.join(["rlkd", *command]) for command in commands), "```", ""]
    return "\n".join(lines)


def introduction(about: Mapping[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return [
        f"{about['date']}, {os.cpu_count()} cores, no GPU, one thread a run, {about['at_once']} runs at once; "
        f"{packages}. Made by `python benchmarks/papers.py`.",
        "",
        f"The task is three-digit addition written out column by column, with at least {CARRIES} carries. The "
        "student (0.86 M parameters) drops most carries, so that alone it rarely succeeds. Every method trains for "
        f"{STEPS} steps × {GROUPS} prompts × {SAMPLES} answers = {STEPS * GROUPS * SAMPLES:,} samples; SFT gets as "
        f"many traces, each of another prompt. Held out: {HOLDOUT} problems of the same kind that are in no training "
        f"set, {HOLDOUT_SAMPLES} answers each at temperature 1, and one greedy.",
        "",
        "What this can show and what not: student and teachers have one size and one way to write an answer, so a "
        "teacher knows better, but not otherwise; all right traces of a problem are the same text. A claim that lives "
        "on diverse reasoning, length or several domains has no chance to show here.",
    ]


def traces_line(traces: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    for name, shares in traces.items():
        told = ", ".join(f"{who} {share:.3f}" for who, share in shares.items() if who != "any")
        any_right = f", one of them right for {shares['any']:.3f}" if len(shares) > 2 else ""
        parts.append(f"`{name}`: {told}{any_right}")
    return (
        f"Traces: one answer of each teacher to each of the {TRAIN:,} training problems, sampled at temperature 1; "
        "why that ends badly here is told in docs/algorithms/thinktuning.md. "
        "Share that is right: " + "; ".join(parts) + "."
    )


def method_notes() -> str:
    return (
        "Mean over seeds ± half of Student's 95 % interval. Seeds differ in the order of prompts and in what was "
        "sampled; models, traces and held-out problems are the same for all. `teacher` is the strong one. ThinkTuning "
        "puts a worked answer of the peer behind the student's own (`form: worked`), sampled at temperature 1. "
        "`seconds` is the wall time of a run with its start-up, beside another run."
    )


def claims_note() -> str:
    return (
        "Decided by the rules at the right, which were written before the runs: d is the difference of two methods at "
        "the same seed, and its 95 % interval is Student's. With this many comparisons about one is expected to look "
        f"clear by chance. The quantile for five seeds is {T975[3]:.3f}."
    )


def settings_note() -> str:
    return (
        f"Learning rates and β were chosen by a pilot with seed {PILOT_SEED} and held-out problems of its own, by "
        "family and not by method, by a rule: the best held-out pass@1, of values within "
        f"{ABOUT_AS_GOOD:g} of it the smallest. "
        "Everything with a reward in its loss (GRPO, KDRL, LUFFY, AMPO, ThinkTuning) has GRPO's learning rate; all "
        "KDRLs have the β of the constant one, annealed to a fifth of it over the paper's share of the run. The rest "
        "is the recipe's."
    )
