"""A sweep of eight trials with ASHA on two cores, in which one trial and then the driver are killed (SIGKILL); the same
command goes on. Prints what happened and how long it took, as json.

    python benchmarks/sweep.py --out DIR [--model models/tiny] [--trials 8]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlkd.chaos import ledger
from rlkd.lease import holder
from rlkd.report.files import read_lines

NAME = "sweep-kills"
STEPS, EVERY = 24, 6
LIMIT_S = 1500.0


def recipe(folder: Path, model: str, **changes: Any) -> Path:
    """The tiny model and a tiny run: what takes time is starting the actors."""
    base: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(Path(model).resolve())},
        "data": {
            "train": {"kind": "arithmetic", "size": 2000, "split": "train"},
            "holdout": {"kind": "arithmetic", "size": 100, "split": "holdout"},
        },
        "algorithm": {"name": "grpo", "norm": "token", "rollout": {"samples": 4}},
        "rewards": {"arithmetic": {}},
        "schedule": {"steps": STEPS, "groups_per_step": 4},
        "sampler": {"engine": "hf", "max_tokens": 48},
        "learner": {"max_tokens": 2048},
        "evaluate": {"every": EVERY, "at_start": False},
        "checkpoint": {"every": 2},
        "health": {"canary_every": 0},
        "ray": {"object_store_gib": 0.1},
        "report": {"tensorboard": False, "directory": str(folder / "runs")},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def space(folder: Path, trials: int, scheduler: str = "asha") -> Path:
    path = folder / "kills.yaml"
    sweep = {"trials": trials, "scheduler": scheduler, "reduction": 2, "seed": 3, "at_once": 2}
    keys = {"learner.lr": {"loguniform": [1e-5, 1e-3]}, "schedule.groups_per_step": {"choice": [4, 8]}}
    path.write_text(yaml.safe_dump({"sweep": sweep, **keys}))
    return path


def until(true: Callable[[], bool], driver: "subprocess.Popen[bytes]", what: str) -> None:
    """Wait for it; RuntimeError if the driver ends before."""
    end = time.monotonic() + LIMIT_S
    while not true():
        if driver.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{what} did not happen; the driver: {driver.poll()}")
        time.sleep(0.2)


def steps(run: Path) -> int:
    """Whole steps that the ledger has."""
    rows = read_lines(run / "ledger.jsonl")
    return max((int(row["step"]) for row in rows), default=0)


def killed_trial(sweep: Path, driver: "subprocess.Popen[bytes]") -> str:
    """Kill the process of a trial in the middle of its run; its name."""
    victim: list[Path] = []

    def one() -> bool:
        runs = sorted(sweep.glob("runs/trial-*"))
        victim[:] = [r for r in runs if EVERY < steps(r) < STEPS - 2 and holder(r) is not None]
        return bool(victim)

    until(one, driver, "a trial in the middle of its run")
    held = holder(victim[0])
    assert held is not None
    os.kill(held.pid, signal.SIGKILL)
    return victim[0].name


def kills(folder: Path, model: str, trials: int, given: list[str]) -> dict[str, Any]:
    """The sweep with both kills; what happened."""
    command = [sys.executable, "-m", "rlkd", "sweep", str(recipe(folder, model)), *given]
    command += ["--space", str(space(folder, trials)), "--name", NAME]
    first = killed(folder, command, trials)
    return gone_on(folder, command, first)


def killed(folder: Path, command: list[str], trials: int) -> dict[str, Any]:
    """Kill a trial, and then, when a third one is under way, the driver."""
    sweep, began = folder / "runs" / NAME, time.monotonic()
    with (folder / "driver.log").open("ab") as log:
        driver = subprocess.Popen(command, stderr=log, stdout=log)
    trial = killed_trial(sweep, driver)
    told = steps(sweep / "runs" / trial)
    until(lambda: steps(sweep / "runs" / trial) > told + 1, driver, f"{trial} going on")
    done = lambda: sum(steps(r) >= EVERY for r in sweep.glob("runs/trial-*"))  # noqa: E731
    until(lambda: done() >= min(3, trials), driver, "a third trial")
    driver.kill()
    driver.wait()
    return {"killed_trial": trial, "seconds_to_the_driver's_end": round(time.monotonic() - began, 1)}


def gone_on(folder: Path, command: list[str], first: dict[str, Any]) -> dict[str, Any]:
    """The same command again, to the end."""
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    after = round(time.monotonic() - began, 1)
    runs = sorted((folder / "runs" / NAME).glob("runs/trial-*"))
    return {
        **first,
        "exit": result.returncode,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "trials": {r.name: attempts(r) | {"steps": steps(r), "whole_ledger": whole(r)} for r in runs},
        "seconds_after": after,
        "seconds": round(first["seconds_to_the_driver's_end"] + after, 1),
    }


def attempts(run: Path) -> dict[str, Any]:
    record = json.loads((run / "run.json").read_text())
    return {"attempts": len(record["attempts"]), "exits": [a.get("exit") for a in record["attempts"]]}


def whole(run: Path) -> bool:
    """Every step once, every ticket once."""
    rows = ledger(run)
    tickets = [row[0] for one in rows.values() for row in one]
    return sorted(rows) == list(range(1, max(rows, default=0) + 1)) and len(tickets) == len(set(tickets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="models/tiny")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("given", nargs="*", help="overrides")
    options = parser.parse_args()
    found = kills(options.out, options.model, options.trials, options.given)
    print(found.pop("stdout"))
    print(json.dumps({k: v for k, v in found.items() if k != "stderr"}, indent=1))


if __name__ == "__main__":
    main()
