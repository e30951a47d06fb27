"""`rlkd resume RUN` goes on with a run from what its folder holds; with `--prove` it shows how exact that would be.

The newest checkpoint is taken twice, each time by a fresh process that trains a few steps in a folder of its own; then
the two are compared. Levels (reliability_ux.md A4):

    L1  what is loaded is what was saved, part by part (checked at every resume; the steps would not begin otherwise)
    L2  the same prompts in the same steps        L3  the same losses and gradient norms, bit by bit
    L4  the same tokens and final weights too
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlkd import chaos
from rlkd.core.errors import CheckpointError, InfrastructureError, PreflightError, nearest
from rlkd.export import checkpoints
from rlkd.report.files import read_lines
from rlkd.report.history import latest

TWIN_S = 3600.0
LEARNED = ("loss", "grad_norm")  # what must be the same at L3
SAMPLED = ("batch/reward", "batch/tokens", "entropy")


def config_of(run: Path) -> Path:
    """The recipe that a run's folder holds. PreflightError, with the runs that are there, if it is none."""
    config = run / "config.yaml"
    if not config.is_file():
        runs = sorted(p.parent.name for p in run.parent.glob("*/run.json"))
        close = nearest(run.name, runs)
        fix = f"did you mean {run.parent / close}?" if close else f"runs in {run.parent}: {', '.join(runs) or 'none'}"
        raise PreflightError("RLKD-E131", "this is no run's folder: it has no config.yaml", where=str(run), fix=fix)
    return config


def prove(run: Path, steps: int = 2, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """The level that the run's newest checkpoint reaches here, and what differed; `text` for people."""
    config_of(run)
    newest = max(checkpoints(run), default=None)
    if newest is None:
        raise CheckpointError("RLKD-K002", "the run has no checkpoint yet", where=str(run), fix="train first")
    folder = Path(tempfile.mkdtemp(prefix=".prove-", dir=run.resolve().parent))
    try:
        twins = [_twin(run, folder, name, newest, steps, tell) for name in ("first", "second")]
        return compared(newest, steps, *twins)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _twin(run: Path, folder: Path, name: str, newest: int, steps: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train `steps` more steps in `folder/name` from a copy (by links) of the checkpoint; what came out."""
    copy = folder / name
    shutil.copytree(checkpoints(run)[newest], copy / "checkpoints" / f"step-{newest:06d}", copy_function=_link_or_copy)
    for file in ("run.json", "config.yaml"):
        shutil.copy(run / file, copy)
    tell(f"{name}: {steps} steps from the checkpoint of step {newest} …")
    here = [f"name={name}", f"report.directory={folder}", f"schedule.steps={newest + steps}"]
    quiet = ["evaluate.at_end=false", "evaluate.every=0", "report.wandb=off", "checkpoint.remote=null"]
    line = [sys.executable, "-m", "rlkd", "train", str(config_of(run)), *here, *quiet]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=TWIN_S)
    except subprocess.TimeoutExpired as late:
        raise InfrastructureError(
            "RLKD-I172", f"{name}: {steps} steps were not done within {TWIN_S:g} s", where=str(run)
        ) from late
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise CheckpointError(
            "RLKD-K106", f"going on from step {newest} ended with exit code {done.returncode}:\n{said}", where=str(run)
        )
    rows = {row["step"]: row for row in latest(read_lines(copy / "metrics.jsonl"))}
    return {"ledger": chaos.ledger(copy), "rows": rows, "weights": chaos.final_weights(copy)}


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def compared(newest: int, steps: int, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The highest level at which the two are equal."""
    after = range(newest + 1, newest + steps + 1)

    def differs(names: tuple[str, ...]) -> list[str]:
        pairs = ((n, first["rows"][s].get(n), second["rows"][s].get(n), s) for s in after for n in names)
        return [f"{name} of step {step}: {a!r} and {b!r}" for name, a, b, step in pairs if a != b]

    ledgers = [s for s in after if first["ledger"].get(s) != second["ledger"].get(s)]
    found = {
        "L2": [f"the prompts of step {s}" for s in ledgers],
        "L3": differs(LEARNED),
        "L4": differs(SAMPLED) + (["the final weights"] if first["weights"] != second["weights"] else []),
    }
    level = "L1"
    for name, different in found.items():
        if different:
            break
        level = name
    lines = [f"level {level}: {steps} steps from step {newest}, twice"]
    lines += [f"{name} not reached; different: {'; '.join(d[:3])}" for name, d in found.items() if d]
    if level != "L4":
        lines.append("bit by bit it is only with deterministic=true, in float32 on CPU")
    return {"level": level, "step": newest, "different": found, "text": "\n".join(lines)}
