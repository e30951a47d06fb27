"""How far `rlkd plan` is off: memory and seconds of three recipes on this machine, and published points of peers.

    python -m benchmarks.plan [--steps 8] [--models models] [--only NAME …]

Each recipe is trained for a few steps, as a user would, in runs/benchmark-plan/NAME; one that has as many steps already
is not run again. Nothing else may run meanwhile. The published points need no run.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plan.md"
FOLDER = Path("runs/benchmark-plan")
WITHOUT = ("evaluate.at_start=false", "evaluate.at_end=false", "report.tensorboard=false", "checkpoint.every=0")
RUNS = {  # name → recipe, model, settings
    "grpo-tiny": ("grpo-tiny", "tiny", ()),
    "grpo-smollm2": ("grpo-smollm2", "smollm2", ()),
    "grpo-smollm2-zero2": ("grpo-smollm2", "smollm2", ("learner.ranks=2", "learner.zero_stage=2")),
}


@dataclass(frozen=True)
class Published:
    """What a peer says of a run of its own; `seconds` None: only that it fits."""

    who: str
    model: str
    hardware: str
    gpus: int
    sequences: int = 2048
    tokens: int = 1060  # of a sequence, prompt and answer
    longest: int = 4096
    tensors: int = 1
    staleness: int = 0
    seconds: float | None = None


NEMO = "NeMo RL v0.4"
SOURCES = (
    "NeMo RL: docs/about/performance-summary.md of NVIDIA-NeMo/RL at 06beed9 (DGX H100, bfloat16, Megatron; GRPO on "
    "OpenMathInstruct-2; a step is 2,048 samples, four optimizer steps of 512, log-probs of policy and reference); who "
    "samples: examples/configs/recipes/llm/performance/async-grpo-*.yaml",
    "verl: docs/perf/device_tuning.rst of volcengine/verl at 0043240 (the fewest GPUs that full GRPO of Qwen2 7B, 14B "
    "and 70B was run on; planned for the models of that size above; H800 has the H100's memory)",
)
POINTS = (
    Published(NEMO, "Llama-3.1-8B", "H100", 16, seconds=97.7),
    Published(NEMO, "Llama-3.1-8B", "H100", 16, tokens=1129, staleness=1, seconds=74.6),
    Published(NEMO, "Qwen3-32B", "H100", 32, tokens=3206, tensors=4, seconds=393),
    Published(NEMO, "Qwen3-32B", "H100", 64, tokens=3207, tensors=4, staleness=1, seconds=215),
)
FITS = (
    Published("verl", "Qwen2.5-7B", "H100", 2),
    Published("verl", "Qwen2.5-14B", "H100", 4),
    Published("verl", "Llama-3.1-70B", "H100", 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    asked = parser.parse_args()
    lines = ["# rlkd plan: predicted and measured", "", _machine(), ""]
    lines += ["| recipe | number | predicted | measured | off |", "|---|---|---|---|---|"]
    for name in asked.only:
        lines += _rows(name, compared(name, asked.steps, asked.models.resolve()))
    lines += ["", "## Published points", "", *_published(), "", *(f"- {source}" for source in SOURCES), ""]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


# --- this machine


def compared(name: str, steps: int, models: Path) -> dict[str, Any]:
    """What `rlkd plan --check` says after the run."""
    recipe, model, settings = RUNS[name]
    given = [str(ROOT / "configs" / f"{recipe}.yaml"), f"model.path={models / model}", f"name={name}", *settings]
    given += [f"report.directory={FOLDER}", f"schedule.steps={steps}", *WITHOUT]
    run, rlkd = FOLDER / name, [sys.executable, "-m", "rlkd"]
    done = run / "metrics.jsonl"
    if not done.exists() or len(done.read_text().splitlines()) < steps:
        print(f"{name}: {steps} steps", file=sys.stderr, flush=True)
        subprocess.run([*rlkd, "train", *given], check=True, stdout=subprocess.DEVNULL)
    found = subprocess.run([*rlkd, "plan", *given, "--check", str(run), "--json"], check=True, capture_output=True)
    numbers: dict[str, Any] = json.loads(found.stdout)
    return numbers


def _rows(name: str, found: Mapping[str, Any]) -> list[str]:
    rows = []
    for number, c in found["compared"].items():
        measured, off = "unknown", ""
        if c["measured"]:
            measured, off = f"{c['measured']:.2f} {c['unit']}", f"{c['predicted'] / c['measured'] - 1:+.0%}"
        rows.append(f"| {name} | {number} | {c['predicted']:.2f} {c['unit']} | {measured} | {off} |")
    return rows


def _machine() -> str:
    import torch

    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    from rlkd.calibration import cores

    return f"{datetime.now(UTC):%Y-%m-%d}, {cores()} cores ({cpu}), no GPU; torch {torch.__version__}."


# --- what peers publish


def _published() -> list[str]:
    lines = [
        "Lengths and numbers of GPUs are theirs, the rest of the recipe is rlkd's: one optimizer step on the same "
        "samples, shared GPUs with ZeRO-3 and checkpointing where they are synchronous; where they are not, half of "
        "the GPUs sample, as theirs do, an eighth scores and the rest learns (theirs score on the learner's GPUs). In "
        "rlkd a rollout worker of several GPUs cannot share them: the synchronous row of 32B is of the formulas only. "
        "`sync` is through shared memory and Ray's object store, at an assumed 1 GB/s each. Nothing was fitted to "
        "these points.",
        "",
    ]
    lines += ["| who | model | GPUs | tokens | stale | published | predicted | off | rollout | score | learn | sync |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for point in POINTS:
        p, seconds = predicted(point), point.seconds
        assert seconds is not None
        lines.append(
            f"| {point.who} | {point.model} | {point.gpus} × {point.hardware} | {point.tokens} | {point.staleness} "
            f"| {seconds:g} s | {p.step.step:.0f} s | {p.step.step / seconds - 1:+.0%} | {p.step.rollout:.0f} s "
            f"| {p.step.score:.0f} s | {p.step.learn:.0f} s | {p.step.sync:.0f} s |"
        )
    lines += [
        "",
        "The fewest GPUs of full GRPO, and whether the plan finds settings that fit on as many. Without a reference "
        "model: rlkd's takes one GPU, and one of 70B needs more than one.",
        "",
    ]
    lines += ["| who | model | GPUs | the plan |", "|---|---|---|---|"]
    for point in FITS:
        lines.append(f"| {point.who} | {point.model} | {point.gpus} × {point.hardware} | {fitting(point)} |")
    return lines


def predicted(point: Published) -> Any:
    from rlkd.plan.devices import changed

    half, few = point.gpus // 2, point.gpus // 8
    apart = {"learner.ranks": half - few, "sampler.workers": half // point.tensors, "ray.share_gpus": False,
             "reference.workers": few}  # fmt: skip
    shared = {"learner.ranks": point.gpus, "sampler.workers": point.gpus // point.tensors, "ray.share_gpus": True,
              "reference.workers": point.gpus}  # fmt: skip
    config = changed(_recipe(point), apart if point.staleness else shared)
    return _planned(point, config)


def fitting(point: Published) -> str:
    """The settings with which the plan fits as many GPUs, or that there are none."""
    from rlkd.plan import offers

    first = _planned(point, _recipe(point, beta=0.0))
    best = offers.best(first, point.gpus, first.work.lengths)
    return "does not fit" if best is None else f"fits: {best}"


def _recipe(point: Published, beta: float = 0.01) -> Any:
    from rlkd.config.load import load
    from rlkd.plan.devices import changed

    config = load(ROOT / "configs" / "grpo-tiny.yaml")
    algorithm = replace(config.algorithm, beta=beta, rollout=replace(config.algorithm.rollout, samples=32))
    config = replace(config, algorithm=algorithm)
    prompt = 128
    return changed(config, {
        "model.device": "cuda", "model.context": point.longest, "schedule.groups_per_step": point.sequences // 32,
        "schedule.staleness": point.staleness, "sampler.max_tokens": point.longest - prompt,
        "data.max_prompt_tokens": prompt, "sampler.tensor_parallel": point.tensors,
        "learner.gradient_checkpointing": True, "learner.zero_stage": 3, "learner.max_tokens": 2 * point.longest,
    })  # fmt: skip


def _planned(point: Published, config: Any) -> Any:
    from rlkd.plan.hardware import GPUS
    from rlkd.plan.known import KNOWN
    from rlkd.plan.plan import Models, planned
    from rlkd.plan.shape import read
    from rlkd.plan.work import Lengths

    shape, prompt = read(KNOWN[point.model], point.model, "benchmark"), 128
    lengths = Lengths(float(prompt), float(point.tokens - prompt), prompt, point.longest - prompt, "published")
    return planned(config, Models(shape, {"reference": shape}), GPUS[point.hardware], lengths)


__all__: Sequence[str] = ["compared", "fitting", "main", "predicted"]

if __name__ == "__main__":
    main()
