"""Groups a second of everything but the models (B9): loop, buffer, ledger, packing, report, and real Ray actors.

    python -m benchmarks.control_plane [--steps 40]

The rollout worker's engine writes at once, the learner's rank does nothing, the reward worker is a real one with its
child (`arithmetic`). Groups of 8 answers, 64 groups a step, two steps of them under way (staleness 1). Then a short run
that counts the driver's calls and the bytes of their arguments and answers, which is not timed.
"""

import argparse
import asyncio
import os
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import ray

from benchmarks.measure import about, cluster, spread, written
from benchmarks.rlkd_side import Unsaved
from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import Shares
from rlkd.core.ports import Completion, Sampling, Services, WeightRef
from rlkd.core.types import Finish, Group, Prompt
from rlkd.curriculum import Uniform
from rlkd.report.report import Report
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import find, pack
from rlkd.rollout import Sampled
from rlkd.store.store import Store
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop, Schedule
from rlkd.workers import ask
from rlkd.workers.learner import LearnerGroup
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.reward import RewardPool
from rlkd.workers.rollout import spawner

SAMPLES, GROUPS, TOKENS, PROMPT = 8, 64, 100, 60  # answers a group, groups a step, tokens of an answer and of a prompt
COUNTED = 3  # steps whose calls are counted


class Instant:
    """An engine that writes at once: random tokens, of which the last says whether the answer is right."""

    written = 0

    @classmethod
    def create(cls, **_: Any) -> "Instant":
        return cls()

    def __init__(self) -> None:
        self.version, self.digest = 0, ""

    def start(self) -> None:
        """Nothing to load."""

    async def generate(self, tokens: np.ndarray, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        drawn = np.random.default_rng(seed).integers(0, 10, (n, sampling.max_tokens)).astype(np.int32)
        logp = np.full(drawn.shape, -2.3, np.float32)
        both = zip(drawn, logp, strict=True)
        return [Completion(row, p, Finish.LENGTH, (self.version, self.version)) for row, p in both]

    async def load(self, ref: WeightRef) -> str:
        self.version, self.digest = ref.version, ref.digest
        return ref.digest

    def status(self) -> tuple[int, str, int]:
        return self.version, self.digest, 0


class Idle:
    """A learner's rank that takes its micro-batches and does nothing with them."""

    def place(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "host": "", "node": ""}

    def open_store(self) -> str:
        return ""

    def start(self, *_: Any) -> None:
        """Nothing to load."""

    def update(self, mine: Sequence[Any], knobs: Mapping[str, float]) -> Shares:
        return Shares()

    def publish(self, version: int) -> WeightRef:
        return WeightRef(version, "", str(version))

    def close(self) -> None:
        """Nothing was published."""


@dataclass
class Timed(Report):
    """The real report, which also keeps when each step ended, and the driver's seconds of CPU by then."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def step(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> None:
        super().step(step, groups, metrics, timings)
        self.marks.append((time.perf_counter(), time.process_time()))


def text_of(tokens: np.ndarray) -> str:
    return f"#{tokens[-1] % 2}"


def prompts(n: int) -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [Prompt(f"p{i}", draw.integers(0, 10, PROMPT).astype(np.int32), "1", text=f"question {i}") for i in range(n)]


@dataclass
class Staff:
    """The actors, and what the driver has of them."""

    pool: Pool
    verify: RewardPool
    learner: LearnerGroup

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator["Staff"]:
        rewards: dict[str, Any] = {"arithmetic": find("arithmetic")()}
        spawn = spawner("benchmarks.control_plane:Instant", {}, {}, lambda _: {})
        pool = Pool("rollout", spawn, 1, Sampling(TOKENS), PoolOptions(probe_s=5.0))
        verify = RewardPool(pack(rewards), Mix.of(rewards), text_of)
        idle = ray.remote(Idle).options(num_cpus=0)
        learner = LearnerGroup(1, lambda _: idle.remote(), {"timeout_s": 60.0}, GRPO(), pool.deliver)
        try:
            await asyncio.gather(pool.start(), verify.start(), learner.start())
            yield cls(pool, verify, learner)
        finally:
            await learner.finish()
            verify.close()
            pool.close()

    async def run(self, steps: int, groups: int, folder: Path) -> Timed:
        """A run of so many steps; what its report has seen."""
        asked, report = prompts(1000), Timed(folder, text_of, steps)
        loop = Loop(
            Schedule(steps, groups, staleness=1), GRPO(rollout=Sampled(SAMPLES)), Uniform(asked, "", 0),
            {p.id: p for p in asked}, Services(self.pool, self.verify), self.learner,
            Unsaved(Store(folder / "checkpoints")), Evaluator((), Sampling(TOKENS), start=False, end=False), report,
        )  # fmt: skip
        await loop.run()
        report.close()
        return report


async def measured(steps: int, groups: int, folder: Path) -> tuple[Timed, "Counts"]:
    """A run that is timed, then one of COUNTED steps whose calls are counted."""
    for name in ("timed", "counted"):
        (folder / name).mkdir()
    counts = Counts()
    async with Staff.start() as staff:
        timed = await staff.run(steps, groups, folder / "timed")
        with patch.object(ask, "_sent", counts.send), patch.object(ask, "call", counts.call):
            await staff.run(COUNTED, groups, folder / "counted")
    return timed, counts


@dataclass
class Counts:
    """Calls by method; bytes of arguments to all actors, and of the rollout workers' answers."""

    calls: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    got: int = 0
    plain: tuple[Any, Any] = (ask._sent, ask.call)

    async def send(self, handle: Any, name: str, method: str, arguments: tuple[Any, ...]) -> Any:
        self.calls[method] += 1
        self.sent += len(pickle.dumps(arguments))
        return await self.plain[0](handle, name, method, arguments)

    async def call(self, *arguments: Any, **more: Any) -> Any:
        answer = await self.plain[1](*arguments, **more)
        self.got += len(pickle.dumps(answer))
        return answer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--groups", type=int, default=GROUPS, help="a step")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    head = about("ray", "torch")
    with cluster(), tempfile.TemporaryDirectory() as name:
        timed, counts = asyncio.run(measured(options.steps, options.groups, Path(name)))
        files = sum(f.stat().st_size for f in Path(name, "timed").rglob("*") if f.is_file())
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(timed.marks[1:])]  # the first two fill the buffer
    rates = [options.groups / wall for wall, _ in steps]
    cpu = statistics.median(options.groups / used for _, used in steps)
    share = sum(used for _, used in steps) / sum(wall for wall, _ in steps)
    total = COUNTED * options.groups
    arrays = SAMPLES * TOKENS * 8  # what an answer's tokens and log-probs are, as arrays
    written("control_plane.md", [
        "# The control plane, without models",
        "",
        f"`python -m benchmarks.control_plane`, {head}",
        f"{options.steps} steps of {options.groups} groups of {SAMPLES} answers of {TOKENS} tokens to prompts of "
        f"{PROMPT}; one rollout worker that writes at once, one reward worker with a child, one idle learner, "
        "staleness 1; steps after the second.",
        "",
        "| what | |",
        "|---|---|",
        f"| groups/s, median of steps (lowest–highest) | {spread(rates)} |",
        f"| groups for a second of the driver's CPU | {cpu:.0f} |",
        f"| the driver's share of one core | {share:.0%} |",
        f"| calls a group: {', '.join(f'{m} {n / total:.2f}' for m, n in counts.calls.most_common())} | "
        f"{counts.calls.total() / total:.2f} |",
        f"| bytes through the driver a group: sent | {counts.sent / total:,.0f} |",
        f"| … of rollout workers' answers (tokens and log-probs alone: {arrays:,}) | {counts.got / total:,.0f} |",
        f"| bytes of the run's files a group | {files / options.steps / options.groups:,.0f} |",
        f"| the driver's memory at the end, MiB | {psutil.Process().memory_info().rss / 2**20:.0f} |",
    ], options.results)  # fmt: skip


if __name__ == "__main__":
    main()
