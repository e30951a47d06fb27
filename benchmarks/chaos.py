"""Kill everything at random instants, hundreds of times, and compare with runs that were left in peace.

    python -m benchmarks.chaos                   all campaigns; about an hour on two cores
    python -m benchmarks.chaos workers vllm      only these

Each campaign is `rlkd chaos` on a small run: real Ray actors, verifiers' child processes and DeepSpeed; the sampler is
a fast engine without a model (tests/chaos/fast_engine.py), but for `vllm`. Written to benchmarks/results/chaos.md after
every campaign; what was there of the others stays.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkd.chaos import FAULTS, chaos
from rlkd.models.get import get
from rlkd.report.files import replace_file
from tests.chaos.recipe import recipe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Campaign:
    """One quiet and one disturbed run."""

    faults: tuple[str, ...]
    kills: int
    gap_s: float  # mean seconds between two faults
    program: str = "tests.chaos.child"
    once_it_moves: bool = False  # the time to a fault counts from the first new step: starting takes most of the time
    changes: dict[str, Any] = field(default_factory=dict)  # of the recipe


# Workers are lost far more often here than the budgets of a run allow for: those are for faults that repeat themselves.
PATIENT = {"sampler": {"replacements": 1000, "replacements_in_10_min": 1000}}
CAMPAIGNS = {
    "workers": Campaign(("rollout", "reward"), 110, 3.0, changes={
        **PATIENT, "schedule": {"steps": 800, "groups_per_step": 3}}),
    "learner": Campaign(("learner",), 40, 6.0, changes={"schedule": {"steps": 800, "groups_per_step": 3}}),
    "two ranks": Campaign(("learner",), 10, 10.0, changes={
        "schedule": {"steps": 400, "groups_per_step": 4}, "learner": {"ranks": 2, "zero_stage": 2}}),
    "driver": Campaign(("driver", "term", "flip"), 30, 12.0, changes={
        "schedule": {"steps": 800, "groups_per_step": 3}}),
    "everything": Campaign(("rollout", "reward", "learner", "driver", "term"), 20, 5.0, changes={
        **PATIENT, "schedule": {"steps": 600, "groups_per_step": 3, "staleness": 1}}),
    "teachers": Campaign(("teacher", "rollout"), 24, 8.0, changes={
        **PATIENT, "schedule": {"steps": 400, "groups_per_step": 3}, "algorithm": {"name": "kdrl"},
        "teachers": {"big": {"workers": 2, "threads": 1}}}),
    "reference": Campaign(("teacher",), 12, 10.0, changes={
        "schedule": {"steps": 400, "groups_per_step": 3}, "algorithm": {"name": "grpo", "beta": 0.01},
        "reference": {"workers": 2, "threads": 1}}),
    "vllm": Campaign(("rollout", "learner", "driver"), 20, 4.0, program="rlkd", once_it_moves=True, changes={
        "sampler": {"engine": "vllm", "max_tokens": 40, "workers": 1, "kv_cache_gib": 0.25, "threads": 1},
        "rewards": {"arithmetic": {}}, "schedule": {"steps": 400, "groups_per_step": 4}}),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", default=list(CAMPAIGNS), help=", ".join(CAMPAIGNS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    codes = [run(name, options.seed) for name in options.campaigns]
    return max(codes)


def run(name: str, seed: int) -> int:
    """One campaign, and its row in the results."""
    campaign = CAMPAIGNS[name]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    model = get("tiny", folder / "tiny")
    path = recipe(folder, model, **campaign.changes)
    result = chaos(command(campaign.program, path, folder), folder / "runs", campaign.faults, campaign.kills,
                   campaign.gap_s, seed, tell=say, once_it_moves=campaign.once_it_moves)  # fmt: skip
    say(result["text"])
    write(name, {k: v for k, v in result.items() if k != "text"})
    shutil.rmtree(folder)  # kept if something went wrong
    return int(result["exit"])


def command(program: str, path: Path, folder: Path) -> Callable[[str], list[str]]:
    start = [sys.executable, "-m", program, "train", str(path)]
    return lambda name: [*start, f"name={name}", f"report.directory={folder / 'runs'}"]


def write(name: str, result: dict[str, Any]) -> None:
    """results/chaos.json and chaos.md."""
    path = RESULTS / "chaos.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    there[name] = {"date": time.strftime("%Y-%m-%d"), **result}
    replace_file(path, json.dumps(there, indent=1) + "\n")
    total = sum(sum(r["faults"].values()) for r in there.values())
    lines = [
        "# Chaos: killed at random instants",
        "",
        "Made by `python -m benchmarks.chaos` on 2 cores. A campaign is the same run twice: in peace, and with faults "
        "at random instants. *Same ledger*: every prompt trained once and in the same step as in the quiet run.",
        "",
        "| campaign | faults | starts | steps | prompts resolved | twice | same ledger | same weights | seconds, quiet "
        "→ disturbed | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, r in there.items():
        told = ", ".join(f"{n} × {fault} ({FAULTS[fault]})" for fault, n in sorted(r["faults"].items()))
        lines.append(
            f"| {key} | {told} | {r['attempts']} | {r['steps']} | {r['resolved']} | {len(r['twice'])} | "
            f"{'yes' if r['same_ledger'] else '**no**'} | {'yes' if r['same_weights'] else 'no'} | "
            f"{r['seconds_quiet']:.0f} → {r['seconds_disturbed']:.0f} | {r['date']} |"
        )
    lines += ["", f"Faults in all: {total}.", ""]
    replace_file(RESULTS / "chaos.md", "\n".join(lines))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
