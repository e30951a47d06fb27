"""Seconds per stage of every recipe on SmolLM2, and what KDRL's teacher costs.

    python -m benchmarks.recipes [NAME …] [--steps 3] [--models models] [--set KEY=VALUE …]

Each recipe makes a few steps as `rlkd train` would, in runs/benchmark-recipes/NAME; one that has as many steps already
is not run again. The table is made of all runs that are there. NAME: kdrl, sft-then-grpo, …; without any: all of them.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recipes-smollm2.md"
STAGES = ("rollout", "verify", "guide", "score", "learn", "sync")
WITHOUT = ("evaluate.at_start=false", "evaluate.at_end=false", "report.tensorboard=false", "report.samples_per_step=64")
Groups = Sequence[Sequence[np.ndarray]]  # of one step: the sequences of each group


@dataclass(frozen=True)
class Runs:
    """Where the runs are, and how long each is."""

    folder: Path
    models: Path
    steps: int
    settings: tuple[str, ...] = ()

    def overrides(self, recipe: Path) -> list[str]:
        from rlkd.config.stages import load

        given = [*WITHOUT, f"schedule.steps={self.steps}", f"report.directory={self.folder}", f"name={recipe.stem}"]
        given.append(f"model.path={self.models / 'smollm2'}")
        for stage in load(recipe):
            at = f"stages.{stage.name}." if stage.name else ""
            for name, teacher in stage.config.teachers.items():
                given.append(f"{at}teachers.{name}.path={self.models / Path(str(teacher.path)).name}")
        return [*given, *self.settings]

    def parts(self, recipe: Path) -> list[tuple[str, Path]]:
        """What the table calls each stage of the recipe, and its run's folder."""
        from rlkd.config.stages import load

        names = [stage.name for stage in load(recipe)]
        name, root = recipe.stem.removesuffix("-smollm2"), self.folder / recipe.stem
        if names == [""]:
            return [(name, root)]
        return [(f"{name}: {stage}", root / f"{number}-{stage}") for number, stage in enumerate(names, 1)]

    def is_done(self, recipe: Path) -> bool:
        return all(len(rows(run)) >= self.steps for _, run in self.parts(recipe))


def rows(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, the last attempt at each; none if there is no such run."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({row["step"]: row for row in map(json.loads, lines)}.values())


def run(recipe: Path, runs: Runs) -> None:
    """Train; SystemExit with the end of what it said if it fails."""
    print(f"{recipe.stem}: {runs.steps} steps", file=sys.stderr, flush=True)
    began = time.monotonic()
    runs.folder.mkdir(parents=True, exist_ok=True)
    log = runs.folder / f"{recipe.stem}.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "rlkd", "train", str(recipe), *runs.overrides(recipe)]
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, timeout=7200, check=False).returncode
    if code:
        raise SystemExit(f"{recipe.stem} ended with {code}:\n" + log.read_text(errors="replace")[-2000:])
    print(f"{recipe.stem}: {time.monotonic() - began:.0f} s with start and end", file=sys.stderr, flush=True)


def median(steps: Sequence[dict[str, Any]], name: str) -> float:
    """Over the steps after the first, which warms up (of one step: that one)."""
    return statistics.median(row.get(name) or 0.0 for row in (steps[1:] or steps))


def line(name: str, steps: Sequence[dict[str, Any]]) -> str:
    step = median(steps, "seconds/step")
    cells = [name, str(len(steps)), f"{median(steps, 'batch/samples'):.0f}", f"{median(steps, 'batch/tokens'):.0f}"]
    cells += [f"{step:.2f}", *(f"{median(steps, f'seconds/{stage}'):.2f}" for stage in STAGES)]
    return "| " + " | ".join(cells) + " |"


# --- what KDRL's teacher costs


def scored_groups(recipe: Path, runs: Runs) -> list[Groups]:
    """Of each step but the first its groups' sequences, prompt and answer, as the teacher got them."""
    from rlkd import inputs
    from rlkd.config.stages import load

    [stage] = load(recipe, runs.overrides(recipe))
    prompts = {p.id: p.tokens for p in inputs.read(stage.config).data.train.prompts}
    steps = []
    for path in sorted((runs.folder / recipe.stem / "samples").glob("step-*.jsonl"))[1:]:
        records = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        steps.append(
            [[np.concatenate([prompts[r["id"]], s["tokens"]]).astype(np.int32) for s in r["samples"]] for r in records]
        )
    return steps


def scoring_seconds(model: Path, steps: Sequence[Groups], threads: int) -> float:
    """Median seconds of one step's scoring with nothing beside it, by the teacher's own engine (engines/scorer.py) in a
    process whose environment is that of a worker."""
    from rlkd.workers.threads import environment

    os.environ.update(environment(threads))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_scoring_seconds, str(model), steps, threads).result()


def _scoring_seconds(model: str, steps: Sequence[Groups], threads: int) -> float:
    from rlkd.engines.scorer import Scorer

    scorer = Scorer.create(path=model, dtype="float32", device="cpu", threads=threads)
    scorer.start()

    async def score(groups: Groups) -> float:
        began = time.perf_counter()
        for group in groups:
            await scorer.logp(group)
        return time.perf_counter() - began

    with asyncio.Runner() as runner:
        runner.run(score(steps[0]))  # warms up
        return statistics.median(runner.run(score(groups)) for _ in range(3) for groups in steps)


def ends(mean: float, last: float, groups: int) -> list[float]:
    """Seconds after which each group's answers are written: evenly spread around their mean, up to the last."""
    first = max(0.0, 2 * mean - last)
    return list(np.linspace(first, last, groups)) if groups > 1 else [last]


def finished(written: Sequence[float], seconds: float) -> float:
    """When one scorer is done that takes `seconds` for each group, in the order in which they are written."""
    at = 0.0
    for end in written:
        at = max(at, end) + seconds
    return at


def teachers_share(runs: Runs, threads: int) -> str:
    """The paragraph on KDRL's teacher; empty unless grpo and kdrl have been run."""
    grpo, kdrl = (rows(runs.folder / f"{name}-smollm2") for name in ("grpo", "kdrl"))
    if len(grpo) < 2 or len(kdrl) < 2:
        return ""
    recipe = ROOT / "configs" / "kdrl-smollm2.yaml"
    steps = scored_groups(recipe, runs)
    score, groups = scoring_seconds(runs.models / "smollm2", steps, threads), len(steps[0])
    alone = median(grpo, "seconds/step")
    mean, last = (median(grpo, f"group_seconds/rollout{end}") for end in ("", "/max"))
    rollout = median(grpo, "seconds/rollout") + median(grpo, "seconds/verify")
    beside = max(0.0, finished(ends(mean, last, groups), score / groups) - last)
    compared = median(kdrl, "seconds/step") - alone
    return f"""## What KDRL's teacher costs

A teacher of the student's size. Measured apart from each other, {threads} threads each: a step of GRPO takes \
{alone:.2f} s, {rollout:.2f} s of them rollout and verification ({groups} groups, written after {mean:.2f} s in the \
mean and {last:.2f} s at the latest); scoring KDRL's {groups} groups of a step takes {score:.2f} s with nothing beside.

| | seconds | share of the step |
|---|---|---|
| scoring after all rollouts | {score:.2f} | {score / (alone + score):.1%} |
| scorers beside the rollout workers: what is left when the last group is written | {beside:.2f} \
| {beside / (alone + beside):.1%} |
| for comparison, two cores for all: the step of KDRL less that of GRPO | {compared:.2f} \
| {compared / (alone + compared):.1%} |

With scorers on hardware of their own a step takes max(rollout + verify, end of scoring) + learn + sync. Group i, \
written at e_i (evenly spread around the measured mean, up to the last), is scored from max(e_i, end of group i−1) on, \
for score/{groups} seconds: at least the last group's scoring comes after the rollouts, at most all of it. The second \
row is computed in this way from measured parts, because two cores cannot do both at once. A teacher r times as large: \
r × score.
"""


def page(recipes: Sequence[Path], runs: Runs, threads: int) -> str:
    done = [(name, rows(folder)) for recipe in recipes for name, folder in runs.parts(recipe) if rows(folder)]
    head = ("recipe", "steps", "samples", "tokens", "step", *STAGES)
    given = f" with {' '.join(runs.settings)}" if runs.settings else ""
    top = f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|"
    table = "\n".join([top, *(line(name, steps) for name, steps in done)])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU, {threads} threads"
    return f"""# The recipes on SmolLM2-135M

`python -m benchmarks.recipes`{given}, {time.strftime("%Y-%m-%d")}: {machine}. Medians over the steps after the first. \
samples, tokens: what one step trains; then its seconds of wall time and, of them, those with at least one call of a \
stage under way: stages overlap, and with teachers they share the cores.

{table}

{teachers_share(runs, threads)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-recipes"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    runs = Runs(args.runs.resolve(), args.models.resolve(), args.steps, tuple(args.set))
    every = {p.stem.removesuffix("-smollm2"): p for p in sorted((ROOT / "configs").glob("*-smollm2.yaml"))}
    unknown = [name for name in args.names if name not in every]
    if unknown:
        raise SystemExit(f"no recipe {', '.join(unknown)}; there are {', '.join(every)}")
    for name in args.names or every:
        if not runs.is_done(every[name]):
            run(every[name], runs)
    text = page(list(every.values()), runs, args.threads).rstrip() + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
