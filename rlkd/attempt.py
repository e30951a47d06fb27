"""One attempt of a run: opened in the run's folder, held alone, and closed with the reason why it ended.

run.json                 name, fingerprint, attempts: when, which process, which packages, exit code
attempts/0001/env.json   the machine, the command, the environment that matters
attempts/0001/exit.json  {code, class, cause, step, saved, hint, resume_command}: written at every end but SIGKILL
.lease                   the process that works here now (lease.py)
"""

import json
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkd import exits
from rlkd import export as exported
from rlkd.config.load import Loaded, resolved
from rlkd.config.schema import Config
from rlkd.core.errors import INFRASTRUCTURE, INTERRUPTED, CheckpointError, PreflightError
from rlkd.core.stop import Stop
from rlkd.fingerprint import packages
from rlkd.lease import Holder, held
from rlkd.report.files import as_json, replace_file

RECORD = "run.json"
OF_INTEREST = ("RAY_", "RLKD_", "CUDA_", "OMP_", "MKL_", "NCCL_", "GLOO_", "SLURM_", "VLLM_", "TORCH_", "PYTHON")
Say = Callable[[str], None]


@dataclass
class Attempt:
    """What is known of it while it runs. `step`: optimizer steps done so far, None before the first is known."""

    directory: Path  # the run's
    number: int
    command: str  # that goes on with the run
    stop: Stop
    step: Callable[[], int | None] = lambda: None
    closed: bool = field(default=False, init=False)

    @property
    def folder(self) -> Path:
        return self.directory / "attempts" / f"{self.number:04d}"

    def close(self, error: BaseException | None = None, end: exits.Exit | None = None) -> None:
        """Write down why it ended, once; an error is given the paragraph for people as a note. A disk that takes
        nothing any more does not hide the error."""
        if self.closed:
            return
        self.closed = True
        end = end or exits.of(error, self.stop.request)
        step, saved = self.step(), max(exported.checkpoints(self.directory), default=None)
        known = {"code": end.code, "class": end.kind, "cause": end.cause, "hint": end.hint}
        known |= {"step": step, "saved": saved, "attempt": self.number, "resume_command": self.command}
        try:
            replace_file(self.folder / "exit.json", as_json(known) + "\n")
            record = read_record(self.directory)
            record["attempts"][self.number - 1] |= {"ended": time.time(), "exit": end.code}
            replace_file(self.directory / RECORD, json.dumps(record, indent=1))
        except OSError as problem:
            sys.stderr.write(
                f"[warning] {problem.filename}: {problem.strerror}: why this attempt ended is not written\n"
            )
        if error is not None:
            where = str(self.folder / "exit.json")
            error.add_note(exits.paragraph(end, self.number, step, saved, self.command, where))

    def interrupted(self) -> None:
        """The user does not want to wait for a save: the process ends right after this."""
        self.close(end=exits.Exit(INTERRUPTED, "user", "Ctrl-C twice: ended without saving"))


@contextmanager
def opened(directory: Path, config: Config, recipe: Path, stop: Stop, say: Say) -> Iterator[Attempt]:
    """Make the run's folder, or go on in it; hold it until the end. Errors pass through, written down."""
    check_folder(directory)
    with held(directory, config.preempt.lease_s, say, lost):
        attempt = Attempt(directory, _enter(directory, config.name), resume_command(config, recipe), stop)
        replace_file(attempt.folder / "env.json", as_json(environment()) + "\n")
        try:
            yield attempt
        except BaseException as error:
            attempt.close(error)
            raise
        attempt.close()


def describe(directory: Path, config: Config, recipe: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write down what the run is: after it was found to be the run that the folder belongs to."""
    record = read_record(directory)
    record["fingerprint"] = dict(fingerprint)
    replace_file(directory / RECORD, json.dumps(record, indent=1))
    replace_file(directory / "config.yaml", resolved(config))
    replace_file(directory / "config.source.yaml", recipe.read_text(encoding="utf-8"))


def read_record(directory: Path) -> dict[str, Any]:
    """run.json; a new one if there is none. PreflightError if it cannot be read."""
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "attempts": list(record["attempts"])}
    except FileNotFoundError:
        return {"name": directory.name, "attempts": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreflightError(
            "RLKD-E161",
            f"the run's record cannot be read: {error!r}",
            where=str(path),
            fix="give another name=…; the checkpoints here can still be exported",
        ) from error


def starting_point(directory: Path, resume: str, attempt: int = 1) -> int | None:
    """`--resume auto|never|STEP`: the step to go back to, None for the newest checkpoint (or the start, if there never
    was one). PreflightError or CheckpointError if the folder is not what attempt `attempt` asks for."""
    there = sorted(exported.checkpoints(directory))
    if resume == "auto":
        return None
    if resume == "never":
        if attempt > 1 or there:  # a fork has a checkpoint before its first attempt
            raise PreflightError(
                "RLKD-E162",
                "--resume never, but there is a run in this folder",
                where=str(directory),
                fix="give another name=…, or --resume auto to go on with it",
            )
        return None
    if int(resume) not in there:
        have = ", ".join(map(str, there)) or "none"
        fix = f"--resume with one of the checkpoints: {have}"
        raise CheckpointError("RLKD-K122", f"there is no checkpoint of step {resume}", str(directory), fix)
    return int(resume)


def set_aside(directory: Path, step: int, attempt: int) -> list[int]:
    """Rename the checkpoints after `step`, which the run is about to write again; their steps. Nothing is deleted."""
    later = sorted(s for s in exported.checkpoints(directory) if s > step)
    for s in later:
        path = exported.checkpoints(directory)[s]
        path.rename(path.with_name(f".old-{path.name}-attempt-{attempt:04d}"))
    return later


def run_directory(config: Config) -> Path:
    """The run's folder. PreflightError if its name leads out of `report.directory`."""
    above = Path(config.report.directory)
    directory = above / config.name
    if directory.resolve().parent != above.resolve():
        raise PreflightError(
            "RLKD-E163",
            f"name={config.name} leads out of report.directory: {directory.resolve()}",
            where=str(directory),
            fix="a link there is not followed: set report.directory to where the run shall be",
        )
    return directory


def check_folder(directory: Path) -> None:
    """PreflightError for a folder that is something else, or with links in it that lead out of it."""
    if not directory.exists():
        return
    others = [p.name for p in directory.iterdir() if not p.name.startswith(".lease")]
    if others and not (directory / RECORD).exists():
        raise PreflightError(
            "RLKD-E132",
            "the run's folder has other things in it and no run.json",
            where=str(directory),
            fix="give another name=…, or report.directory=…",
        )
    root = directory.resolve()
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise PreflightError(
                    "RLKD-E164",
                    f"a link in the run's folder leads out of it, to {path.resolve()}",
                    where=str(path),
                    fix="put the files themselves there; or set report.directory to where the run shall be",
                )


def resume_command(config: Config, recipe: Path) -> str:
    """The command that goes on with this run."""
    overrides = config.written.overrides if isinstance(config, Loaded) else ()
    path = config.written.path if isinstance(config, Loaded) and config.written.path else str(recipe)
    return shlex.join(["rlkd", "train", path, *overrides])


def environment() -> dict[str, Any]:
    """For env.json: what may explain, later, why two attempts differ."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "folder": os.getcwd(),
        "command": sys.argv,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(OF_INTEREST)},
        "packages": packages(),
    }


def _enter(directory: Path, name: str) -> int:
    """Note a new attempt in run.json; its number."""
    record = read_record(directory)
    number = len(record["attempts"]) + 1
    entry = {"attempt": number, "started": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
    record |= {"name": name, "attempts": [*record["attempts"], {**entry, "packages": packages()}]}
    replace_file(directory / RECORD, json.dumps(record, indent=1))
    return number


def lost(other: Holder) -> None:
    """Somebody else has the folder now: whatever this process would still write there would be wrong."""
    who = f"pid {other.pid} on {other.host}"
    text = f"this process stood still for too long, and {who} holds its run now: it ends without writing anything"
    try:
        os.write(2, f"\nerror[RLKD-I160]: {text} (exit {INFRASTRUCTURE})\n".encode())
    finally:
        os._exit(INFRASTRUCTURE)
