"""The runs of benchmarks/papers.py: `rlkd train` as child processes, a few at once, each finished one never again."""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from papers_methods import (
    PASS_AT,
    STEPS,
    Method,
    Stage,
    overrides,
    run_name,
    shared,
)
from papers_models import greedy

from rlkd.export import newest
from rlkd.guidance.teaching import Teaching
from rlkd.report.files import replace_file
from rlkd.report.history import History

ATTEMPTS = 2  # of one run: rlkd continues where it stopped
RUN_TIMEOUT_S, STOP_TIMEOUT_S = 3600.0, 120.0
ENDS = 5  # steps at the start and at the end over which training metrics are averaged
WINDOW = 8  # steps, for what stays after ThinkTuning's teacher is off
SWITCH_OFF = next(t for t in range(STEPS + 1) if not Teaching(steps=STEPS).at(t))  # steps done with the teacher


class Failed(Exception):
    """A child process that did not end well; says where its log is."""


@dataclass(frozen=True)
class Place:
    """Where one stage of a method and a seed runs, and by which command."""

    directory: Path
    recipe: str
    settings: tuple[str, ...]
    steps: int

    @property
    def command(self) -> list[str]:
        return ["train", self.recipe, f"name={self.directory.name}", *self.settings]


def places(method: Method, seed: int, work: Path) -> list[Place]:
    """A method's stages in order. Where the second starts from is known before the first has run."""
    found: list[Place] = []
    for number, stage in enumerate(method.stages):
        before = None
        if found:
            before = str(found[-1].directory / "checkpoints" / f"step-{found[-1].steps:06d}" / "hf")
        directory = work / "runs" / run_name(method.key, stage, number, seed, str(work))
        found.append(Place(directory, stage.recipe, overrides(str(work), stage, seed, before), stage.steps))
    return found


def finished(place: Place) -> bool:
    """Whether its last attempt ended well, with the evaluation after the last step."""
    try:
        attempts = json.loads((place.directory / "run.json").read_text())["attempts"]
    except FileNotFoundError:
        return False
    return attempts[-1].get("exit") == 0 and evaluation_file(place).exists()


def evaluation_file(place: Place) -> Path:
    return place.directory / "eval" / f"step-{place.steps:06d}.json"


@dataclass
class Runner:
    """Starts children and knows how to stop them all."""

    work: Path
    _children: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, method: Method, seed: int) -> dict[str, Any]:
        """All stages, unless they are finished already; what they found. Failed if one does not end well."""
        chain = places(method, seed, self.work)
        for place in chain:
            for _ in range(ATTEMPTS):
                if not finished(place):
                    code = self.rlkd(place.command, self.log(place))
            if not finished(place):
                raise Failed(f"{place.directory.name} ended with {code}: see {self.log(place)}")
        return outcome(chain)

    def log(self, place: Place) -> Path:
        return self.work / "logs" / f"{place.directory.name}.log"

    def rlkd(self, arguments: Sequence[str], log: Path, out: Path | None = None) -> int:
        """One `rlkd` command with one thread; its exit code. Both outputs go to `log`, or stdout to `out`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env.pop("RAY_ADDRESS", None)  # a cluster of its own for each run
        with log.open("ab") as file, contextlib.ExitStack() as stack:
            stdout = stack.enter_context(out.open("wb")) if out else file
            with self._lock:
                if self.stopping.is_set():
                    raise Failed("stopped")
                child = subprocess.Popen(
                    [sys.executable, "-m", "rlkd", *arguments],
                    stdout=stdout, stderr=file, stdin=subprocess.DEVNULL, env=env, start_new_session=True,
                )  # fmt: skip
                self._children.add(child)
            try:
                return child.wait(RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                file.write(f"no end after {RUN_TIMEOUT_S:.0f} s\n".encode())
                return end(child)
            finally:
                self._children.discard(child)

    def stop(self) -> None:
        """Let every run save its last whole step, and end."""
        with self._lock:
            self.stopping.set()
        children = list(self._children)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        for child in children:
            end(child)


def end(child: "subprocess.Popen[bytes]") -> int:
    """SIGTERM (rlkd saves), and after a while SIGKILL to all it started; its exit code."""
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        return child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait(STOP_TIMEOUT_S)


# --- what a run's files say


def outcome(chain: Sequence[Place]) -> dict[str, Any]:
    """The metrics of the last stage, seconds of all. KeyError or ValueError for files that are not rlkd's."""
    last = chain[-1]
    rows = History.read(last.directory).rows
    first = History.read(chain[0].directory).rows
    whole = [row for place in chain for row in History.read(place.directory).rows]
    return {
        **held_out(json.loads(evaluation_file(last).read_text())),
        "greedy": greedy_of(last),
        "all_wrong_start": average(first[:ENDS], "groups/all_wrong"),
        "all_wrong_end": average(rows[-ENDS:], "groups/all_wrong"),
        "guided": average(whole, "guided"),
        "right_after_off": average(rows[SWITCH_OFF : SWITCH_OFF + WINDOW], "right"),
        "right_late": average(rows[-WINDOW:], "right"),
        "samples": sum(row["batch/samples"] for row in whole),
        "seconds": sum(seconds(place) for place in chain),
        "right": [row.get("right") for row in rows],
        "runs": [str(place.directory) for place in chain],
    }


def held_out(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """pass@k and length; NaN for what the file leaves unknown."""
    found = {f"pass@{k}": evaluation[f"eval/pass@{k}"] for k in PASS_AT}
    found["length"] = evaluation["eval/length"]
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def average(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """NaN if none of the rows knows it."""
    known = [float(row[name]) for row in rows if row.get(name) is not None]
    return statistics.fmean(known) if known else math.nan


def seconds(place: Place) -> float:
    """Wall time of all attempts from the moment that the run's folder is opened; a killed one did not write its end."""
    attempts = json.loads((place.directory / "run.json").read_text())["attempts"]
    return float(sum(a["ended"] - a["started"] for a in attempts if "ended" in a))


def greedy_of(place: Place) -> float:
    """Worked out once, and kept in the run's folder."""
    path = place.directory / "greedy.json"
    if not path.exists():
        replace_file(path, json.dumps({"greedy": greedy(newest(place.directory))}))
    return float(json.loads(path.read_text())["greedy"])


def evaluate_model(runner: Runner, name: str) -> dict[str, float]:
    """A model before any training, by `rlkd eval`; kept in the work folder."""
    path = runner.work / f"eval-{name}.json"
    if not path.exists():
        stage = Stage("configs/grpo-tiny.yaml", ())
        unfinished = path.with_suffix(".partial")
        command = ["eval", str(runner.work / name), stage.recipe, "--json", *shared(str(runner.work), stage)]
        code = runner.rlkd(command, runner.work / "logs" / f"eval-{name}.log", unfinished)
        if code:
            raise Failed(f"evaluating {name} ended with {code}: see {runner.work / 'logs'}")
        found = held_out(json.loads(unfinished.read_text().splitlines()[-1]))
        replace_file(path, json.dumps({**found, "greedy": greedy(runner.work / name)}))
        unfinished.unlink()
    return {k: float(v) for k, v in json.loads(path.read_text()).items()}
