"""Answers a second of a reward worker, and what is left behind when some answers are hostile (B10).

    python -m benchmarks.verifier [--groups 250]

A real worker: a Ray actor, its keeper and one or two children, asked through the driver's RewardPool, as many groups at
once as there are children. Math answers are boxed; right ones in another form than the gold answer. *mixed* is 80 %
integers, 15 % fractions, 5 % polynomials; *hostile* is mixed with one answer in a hundred that sleeps, holds the
interpreter, forks into sessions of its own, eats memory or ends its process. Leaked: processes of the worker and file
descriptors of actor and keeper more than before, and processes that outlive the worker.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from benchmarks.hostile import DEEDS
from benchmarks.measure import about, cluster, written
from rlkd.core.types import Origin, Prompt, Sample
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import find, pack
from rlkd.workers.reward import RewardPool, WorkerOptions

SAMPLES, GRACE_S = 8, 2.0  # answers a group; Jail.grace_s
HOSTILE = f"{Path(__file__).with_name('hostile.py')}:Hostile"


# --- questions: (gold, right in another form, wrong)


def integer(draw: random.Random) -> tuple[str, str, str]:
    n = draw.randint(1, 99_999)
    return str(n), f"+{n}", str(n + 1)


def fraction(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(1, 99), draw.randint(2, 99)
    return rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{3 * a}}}{{{3 * b}}}", rf"\frac{{{a + 1}}}{{{b}}}"


def polynomial(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    return f"(x+{a})(x-{b})", f"x^2+({a - b})x-{a * b}", f"x^2+({a - b})x-{a * b + 1}"


def mixed(draw: random.Random) -> tuple[str, str, str]:
    return draw.choices([integer, fraction, polynomial], [80, 15, 5])[0](draw)


@dataclass(frozen=True)
class Case:
    """What is asked."""

    name: str
    reward: str
    question: Callable[[random.Random], tuple[str, str, str]]
    processes: int = 1
    hostile: int = 0  # answers of a hundred
    groups: float = 1.0  # of those asked for


CASES = [
    Case("arithmetic", "arithmetic", integer),
    Case("math, integers", "math", integer),
    Case("math, fractions", "math", fraction, groups=0.4),
    Case("math, polynomials", "math", polynomial, groups=0.1),
    Case("math, mixed", "math", mixed),
    Case("math, mixed, two children", "math", mixed, processes=2),
    Case("hostile, two children", HOSTILE, mixed, processes=2, hostile=1),
]


def questions(case: Case, groups: int) -> tuple[list[tuple[Prompt, list[Sample]]], list[str]]:
    """Groups of answers, and the texts that their last tokens stand for."""
    draw, texts, found = random.Random(0), list[str](), []
    bad = iter(DEEDS)
    for number in range(groups):
        gold, right, wrong = case.question(draw)
        samples = []
        for i in range(SAMPLES):
            text = right if draw.random() < 0.5 else wrong
            text = f"#{text.lstrip('+')}" if case.reward == "arithmetic" else rf"\boxed{{{text}}}"
            if case.hostile and (number * SAMPLES + i) % (100 // case.hostile) == 50:
                text = next(bad, None) or next(bad := iter(DEEDS))
            texts.append(text)
            tokens = np.array([0, len(texts) - 1], np.int32)
            origin = np.array([Origin.PROMPT, Origin.POLICY], np.uint8)
            samples.append(Sample(tokens, origin, np.array([np.nan, 0], np.float32), (0, 0)))
        found.append((Prompt(f"p{number}", np.array([0], np.int32), gold), samples))
    return found, texts


async def asked(case: Case, groups: int, timeout_s: float, note: Path) -> dict[str, Any]:
    """A worker of its own for the case; it is gone at the end. `note`: where hostile forks write their pids."""
    work, texts = questions(case, groups)
    rewards: dict[str, Any] = {"reward": find(case.reward)(**({"note": str(note)} if case.hostile else {}))}
    options = WorkerOptions(processes=case.processes, timeout_s=timeout_s)
    pool = RewardPool(pack(rewards), Mix.of(rewards), lambda t: texts[t[-1]], options=options, on_error="zero",
                      max_error_fraction=1.0)  # fmt: skip
    try:
        await pool.start()
        for prompt, samples in work[: 2 * case.processes] if not case.hostile else ():
            await pool(prompt, samples)  # warm
        actor = psutil.Process(pool.roster()["reward-0"]["pid"])
        before, seen = held(actor), set(actor.children(recursive=True))
        free, slowest, right = asyncio.Semaphore(case.processes), list[float](), 0

        async def one(prompt: Prompt, samples: list[Sample]) -> None:
            nonlocal right
            async with free:
                began = time.perf_counter()
                judged = await pool(prompt, samples)
                slowest.append(time.perf_counter() - began)
                right += sum(s.reward == 1.0 for s in judged)

        began = time.perf_counter()
        await asyncio.gather(*(one(p, s) for p, s in work))
        whole = time.perf_counter() - began
        seen |= set(actor.children(recursive=True))
        left = held(actor)
        longest = pool._workers[0]._longest_s
    finally:
        pool.close()
    seen |= {psutil.Process(int(pid)) for pid in note.read_text().split() if psutil.pid_exists(int(pid))}
    _, alive = psutil.wait_procs([actor, *seen], timeout=10)
    return {
        "case": case, "answers": len(texts), "bad": sum(t in DEEDS for t in texts),
        "rate": len(texts) / whole / case.processes, "right": right / len(texts),
        "p50": statistics.median(slowest), "p99": float(np.percentile(slowest, 99)), "worst": max(slowest),
        "longest": longest, "counts": pool.counts(), "processes": left[0] - before[0], "files": left[1] - before[1],
        "outlive": len([p for p in alive if p.status() != psutil.STATUS_ZOMBIE]),
    }  # fmt: skip


def held(actor: psutil.Process) -> tuple[int, int]:
    """Processes below an actor, and open files of actor and keeper."""
    below = actor.children(recursive=True)
    return len(below), actor.num_fds() + sum(p.num_fds() for p in actor.children())


def row(found: dict[str, Any]) -> str:
    cells = [
        found["case"].name, found["answers"], f"{found['rate']:,.0f}", f"{found['right']:.0%}",
        f"{found['p50'] * 1e3:.0f}", f"{found['p99'] * 1e3:.0f}", f"{found['worst']:.1f} (≤ {found['longest']:.0f})",
        f"{found['counts']['zeroed']} of {found['bad']}", found["processes"], found["files"], found["outlive"],
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=250)
    parser.add_argument("--timeout-s", type=float, default=2.0, help="verifier.timeout_s of the hostile case")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    head = about("ray", "math-verify", "sympy")
    rows = []
    # failed answers are kept in the temporary directory
    with cluster(), tempfile.TemporaryDirectory() as folder, patch("tempfile.tempdir", folder):
        note = Path(folder) / "pids"
        note.touch()
        for case in CASES:
            groups = max(int(options.groups * case.groups), 1)
            rows.append(row(asyncio.run(asked(case, groups, options.timeout_s if case.hostile else 10.0, note))))
            print(rows[-1], flush=True)
    written("verifier.md", [
        "# The verifier: answers a second, and what is left behind",
        "",
        f"`python -m benchmarks.verifier`, {head}",
        f"{SAMPLES} answers a group; the hostile case with verifier.timeout_s={options.timeout_s:g}, {GRACE_S:g} s of "
        "grace before a kill, and one answer in a hundred hostile.",
        "",
        "| case | answers | answers/s a child | right | group, median ms | p99 ms | slowest s (bound) | "
        "given up, of hostile | processes leaked | files leaked | outlive the worker |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ], options.results)  # fmt: skip


if __name__ == "__main__":
    main()
