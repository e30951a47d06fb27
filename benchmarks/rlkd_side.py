"""rlkd on the work that vs_trl.py describes: the same actors, loop and learner as `rlkd train`.

    python benchmarks/rlkd_side.py SPEC.json OUT.json

Every answer's length is forced by a rollout of its own, as a user would write one.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rlkd import inputs
from rlkd.config.load import load
from rlkd.core.ports import Knobs, Services, as_sample
from rlkd.core.types import Group, Prompt
from rlkd.curriculum import Uniform
from rlkd.fleet import Fleet
from rlkd.rollout import Sampled
from rlkd.run import evaluator
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.loop import Loop

STAGES = ("rollout", "verify", "score", "learn", "sync")


@dataclass(frozen=True)
class ForcedLengths(Sampled):
    """Answers of given lengths: `lengths[prompt id]`, one per sample."""

    lengths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    longest: int = 0

    async def __call__(self, prompt: Prompt, ask: Services, knobs: Knobs) -> Group:
        how = ask.policy.sampling  # type: ignore[attr-defined]
        calls = [
            ask.policy.generate(prompt.tokens, 1, prompt.seed + i, replace(how, max_tokens=n, min_tokens=n))
            for i, n in enumerate(self.lengths[prompt.id])
        ]
        return Group(prompt, tuple(as_sample(prompt, c) for [c] in await asyncio.gather(*calls)))


class InOrder(Uniform):
    """The prompts as they stand."""

    def draw(self) -> Prompt:
        prompt = self.prompts[self.cursor % len(self.prompts)]
        self.cursor += 1
        return prompt


class Unsaved(Checkpoints):
    """Saving is not measured."""

    def due(self, step: int, steps: int) -> bool:
        return False


@dataclass
class Seconds:
    """What the loop reports, as far as it is measured here."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None:
        """Nothing is kept of single groups."""

    def step(self, step: int, groups: Any, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        self.rows.append({"at": time.perf_counter(), **timings})

    def resolved(self, step: int, rows: Any) -> None:
        """Nothing is kept of the ledger."""

    def event(self, kind: str, text: str, **_: Any) -> None:
        print(kind, text, file=sys.stderr)


def recipe(spec: Mapping[str, Any], folder: Path) -> Path:
    rows = [text for step in spec["prompts"] for text in step]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": t, "answer": "?"}) + "\n" for t in rows))
    (folder / "parity.py").write_text("def parity(prompt, text):\n    return float(len(text) % 2)\n")
    longest = max(n for step in spec["lengths"] for n in step)
    settings: dict[str, Any] = {
        "model": {"path": spec["model"]},
        "data": {"train": {"kind": "jsonl", "path": str(folder / "rows.jsonl")}},
        "algorithm": {"name": "grpo", "rollout": {"samples": spec["samples"]}},
        "rewards": {f"{folder}/parity.py:parity": {}},
        "schedule": {"steps": len(spec["prompts"]), "groups_per_step": len(spec["prompts"][0])},
        "sampler": {"max_tokens": longest, "max_num_seqs": 64, "kv_cache_gib": 2},
        "learner": {"lr": spec["lr"], "max_tokens": 4096},
        "evaluate": {"at_start": False, "at_end": False},
        "ray": {"wait_s": 60},
    }
    if "teacher" in spec:
        settings["algorithm"] |= {"name": "kdrl", "beta_0": 5e-3, "beta_decay": 0, "distill": spec["distill"]}
        settings["teachers"] = {"teacher": {"path": spec["teacher"]}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


async def measure(spec: Mapping[str, Any], folder: Path) -> Seconds:
    config = load(recipe(spec, folder))
    read = inputs.read(config)
    flat = [step[i : i + spec["samples"]] for step in spec["lengths"] for i in range(0, len(step), spec["samples"])]
    prompts = read.data.train.prompts
    rollout = ForcedLengths(spec["samples"], {p.id: n for p, n in zip(prompts, flat, strict=True)})
    seconds = Seconds()
    async with Fleet.start(config, read, folder, seconds.event) as fleet:
        loop = Loop(
            config.schedule, replace(config.algorithm, rollout=rollout), InOrder(prompts, "", 0),
            {p.id: p for p in prompts}, fleet.services, fleet.learner, Unsaved(Store(folder / "none")),
            evaluator(config, read), seconds, max_tokens=config.learner.max_tokens,
        )  # fmt: skip
        await loop.run()
    return seconds


def main(spec_path: str, out_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    with tempfile.TemporaryDirectory() as name:
        rows = asyncio.run(measure(spec, Path(name))).rows
    steps = [b["at"] - a["at"] for a, b in pairwise(rows)]
    stages = {stage: [row.get(stage, 0.0) for row in rows[1:]] for stage in STAGES}
    Path(out_path).write_text(json.dumps({"seconds": [float("nan"), *steps], "stages": stages}))


if __name__ == "__main__":
    main(*sys.argv[1:])
