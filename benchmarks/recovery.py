"""Seconds from a kill until the run is at work again.

    python -m benchmarks.recovery                five kills of each kind; about ten minutes on two cores

The demo's model and task on the real stack (vLLM, DeepSpeed, verifiers), two rollout workers. Measured from SIGKILL:

    re-dispatch   to the moment when the groups that the dead rollout worker had in hand are asked for elsewhere
    replaced      until its successor has the current weights and gets work
    verifier      SIGKILL of the reward worker, until the next step is done
    learner       SIGKILL of the learner, until the next step is done: new process, last checkpoint, weights handed out
    driver        SIGKILL of the driver, the same command again at once, until the next step is done; also with one
                  rollout worker, as the demo has it

Written to benchmarks/results/recovery.md.
"""

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlkd.chaos import end, steps, victims
from rlkd.models.get import get
from rlkd.report.files import read_lines, replace_file
from tests.chaos.recipe import recipe

RESULT = Path(__file__).parent / "results" / "recovery.md"
WAIT_S = 180.0
BOUNDS = {"re-dispatch": 5.0, "driver, one rollout worker": 30.0}  # of the issue


class Run:
    """A run that goes on until it is ended."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.workers = workers
        model = get("tiny", folder / "tiny")
        changes = {
            "sampler": {"engine": "vllm", "max_tokens": 48, "workers": workers, "kv_cache_gib": 0.25, "threads": 1},
            "rewards": {"arithmetic": {}}, "schedule": {"steps": 100_000, "groups_per_step": 8},
            "algorithm": {"rollout": {"samples": 8}}, "checkpoint": {"every": 1}, "learner": {"max_restarts": 100},
        }  # fmt: skip
        path = recipe(folder, model, **changes)
        self.command = [sys.executable, "-m", "rlkd", "train", str(path)]
        self.directory, self.log = folder / "chaos", folder / "log"
        self.chance = random.Random(0)
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.driver = subprocess.Popen(self.command, stdout=out, stderr=out)

    def until(self, what: str, found: Callable[[], Any]) -> Any:
        """What `found` gives as soon as that is something; TimeoutError if it never does."""
        since = time.monotonic()
        while time.monotonic() - since < WAIT_S:
            if (result := found()) is not None:
                return result
            if self.driver.poll() is not None:
                raise RuntimeError(f"the run ended with exit {self.driver.returncode}: see {self.log}")
            time.sleep(0.005)
        raise TimeoutError(f"{what}: not within {WAIT_S:g} s; see {self.log}")

    def step_after(self, step: int) -> float:
        return float(self.until(f"step {step + 1}", lambda: time.time() if steps(self.directory) > step else None))

    def settle(self) -> None:
        """Everybody is there, and two more steps are done; then at a random instant of a step."""
        for kind, size in (("rollout", self.workers), ("reward", 1), ("learner", 1)):
            self.until(f"{size} × {kind}", lambda k=kind, n=size: True if len(self.ready(k)) >= n else None)
        self.step_after(steps(self.directory) + 1)
        time.sleep(self.chance.uniform(0.0, 1.0))

    def ready(self, kind: str) -> list[tuple[str, int]]:
        states = self.roster()
        there = victims(self.directory, kind, self.driver.pid)
        return [(name, pid) for name, pid in there if states[name].get("state") in ("is ready", "is there")]

    def roster(self) -> dict[str, Any]:
        rosters = sorted(self.directory.glob("attempts/*/pids.json"))
        actors: dict[str, Any] = json.loads(rosters[-1].read_text())["actors"] if rosters else {}
        return actors

    def events(self, kind: str) -> list[Any]:
        path = self.directory / "events.jsonl"
        return [e for e in (read_lines(path) if path.exists() else []) if e["kind"] == kind]

    def strike(self, kind: str) -> tuple[str, int, float, int]:
        """Name and pid of whom it met, when, and the last step then."""
        name, pid = self.chance.choice(self.ready(kind))
        step, now = steps(self.directory), time.time()
        os.kill(pid, signal.SIGKILL)
        return name, pid, now, step


def rollout(run: Run) -> dict[str, float]:
    """A worker that had nothing in hand is no measurement of a re-dispatch: NaN then."""
    before = len(run.events("worker_lost"))
    name, pid, then, _ = run.strike("rollout")

    def successor() -> float | None:
        row = run.roster().get(name, {})
        return time.time() if row.get("pid") not in (pid, None) and row.get("state") == "is ready" else None

    again = run.until(f"a successor of {name}", successor) - then
    asked = [e for e in run.events("worker_lost")[before:] if e.get("stage") == "rollout"]
    first = min((seconds(e) - then for e in asked), default=float("nan"))
    return {"re-dispatch": first, "replaced": again}


def seconds(event: Any) -> float:
    from datetime import datetime

    return datetime.fromisoformat(event["time"]).timestamp()


def to_next_step(kind: str, name: str) -> Callable[[Run], dict[str, float]]:
    def measure(run: Run) -> dict[str, float]:
        _, _, then, step = run.strike(kind)
        return {name: run.step_after(step) - then}

    return measure


def driver(name: str) -> Callable[[Run], dict[str, float]]:
    def measure(run: Run) -> dict[str, float]:
        step, then = steps(run.directory), time.time()
        run.driver.kill()
        run.driver.wait()
        run.start()
        return {name: run.step_after(step) - then}

    return measure


KINDS = {
    "rollout": rollout,
    "verifier": to_next_step("reward", "verifier"),
    "learner": to_next_step("learner", "learner"),
    "driver": driver("driver"),
}
WITH_ONE = {"driver": driver("driver, one rollout worker")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    found: dict[str, list[float]] = {}
    for workers, kinds in ((2, KINDS), (1, WITH_ONE)):
        with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
            run = Run(Path(folder), workers)
            try:
                for kind, measure in kinds.items():
                    for _ in range(repeats):
                        run.settle()
                        measured = measure(run)
                        print(kind, {k: round(v, 2) for k, v in measured.items()}, flush=True)
                        for name, value in measured.items():
                            found.setdefault(name, []).append(value)
            finally:
                end(run.driver)
    write(found)
    return 0


def write(found: dict[str, list[float]]) -> None:
    lines = [
        "# Seconds to recover",
        "",
        f"Made by `python -m benchmarks.recovery` on {time.strftime('%Y-%m-%d')}, 2 cores: the tiny model, vLLM, two "
        "rollout workers if nothing else is said, 8 × 8 samples a step, a checkpoint every step. What a row measures: "
        "benchmarks/recovery.py.",
        "",
        "| | median | least | most | kills | bound |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        known = [v for v in values if v == v]
        bound = f"≤ {BOUNDS[name]:g}" if name in BOUNDS else ""
        figures = (statistics.median(known), min(known), max(known)) if known else (math.nan,) * 3
        lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in figures) + f" | {len(known)} | {bound} |")
    replace_file(RESULT, "\n".join([*lines, ""]))
    print(RESULT.read_text())


if __name__ == "__main__":
    sys.exit(main())
