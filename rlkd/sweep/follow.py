"""A run of rlkd in a thread of this process, and what it tells."""

import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd import export as exported
from rlkd import staged
from rlkd.config.schema import Config
from rlkd.config.stages import Stage
from rlkd.core.stop import Stop, StopRequest
from rlkd.lease import age_s, holder
from rlkd.report.history import History
from rlkd.watch import Watch

LOOK_S = 0.1
LOOK_FAR_S = 2.0  # at another machine's process: by files that are shared


@dataclass(frozen=True)
class Heard:
    """A held-out evaluation. `step` counts on through the stages of a recipe."""

    step: int
    metrics: Mapping[str, float]


class Following:
    """The run begins when this is made. Asked from one thread."""

    def __init__(self, stages: Sequence[Stage], recipe: Path, folder: Path, resume: str = "auto") -> None:
        self.stages, self.folder = stages, folder
        self.stop = Stop()
        self._recipe, self._resume = recipe, resume
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._began = steps_saved(stages, folder)
        self._thread = threading.Thread(target=self._run, name="run", daemon=True)
        self.error: BaseException | None = None
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def next(self, wait_s: float = LOOK_S) -> Heard | None:
        """An evaluation that was not asked for yet; None if there is none within `wait_s`."""
        try:
            return self._heard.get(timeout=wait_s)
        except queue.Empty:
            return None

    def end(self, request: StopRequest | None, wait_s: float) -> bool:
        """Wait until the run has ended, after asking it to if there is a request; whether it has."""
        if request is not None and self.running:
            self.stop.ask(request)
        self._thread.join(wait_s)
        return not self.running

    def saved(self, step: int, wait_s: float) -> None:
        """Wait until a checkpoint of this step or a later one is committed, or the run has ended."""
        until = time.monotonic() + wait_s
        while self.running and time.monotonic() < until and max(exported.checkpoints(self.folder), default=-1) < step:
            time.sleep(LOOK_S)

    def gained(self) -> bool:
        """Whether more is saved than when it began."""
        return steps_saved(self.stages, self.folder) > self._began

    def _run(self) -> None:
        watch = Watch(self.stop, self._evaluated)
        try:
            staged.train(self.stages, self._recipe, self._resume, watch=watch)
        except BaseException as error:  # of whatever kind: it is the trial that says what it means
            self.error = error

    def _evaluated(self, config: Config, step: int, metrics: Mapping[str, float]) -> None:
        self._heard.put(Heard(before(self.stages, config.name) + step, dict(metrics)))


def before(stages: Sequence[Stage], folder: str) -> int:
    """Steps of the stages before the one in this folder; 0 without stages."""
    done = 0
    for number, stage in enumerate(stages, 1):
        if not stage.name or folder == f"{number}-{stage.name}":
            return done
        done += stage.config.schedule.steps
    raise ValueError(f"{folder} is no stage of this run")


def steps_saved(stages: Sequence[Stage], root: Path) -> int:
    """Optimizer steps that the checkpoints of a run, or of all its stages, have behind them."""
    folders = [root / f"{n}-{s.name}" for n, s in enumerate(stages, 1)] if stages[0].name else [root]
    return sum(max(exported.checkpoints(folder), default=0) for folder in folders)


def recorded(stages: Sequence[Stage], root: Path) -> Heard | None:
    """The newest evaluation in the run's folder that its newest checkpoint has behind it; None if there is none."""
    folder = staged.begun_folder(root)
    saved = max(exported.checkpoints(folder), default=None)
    if saved is None:
        return None
    done = {step: e for step, e in History.read(folder).evaluations.items() if step <= saved}
    if not done:
        return None
    step = max(done)
    metrics = {name: value for name, value in done[step].items() if name.startswith("eval/") and value is not None}
    return Heard(before(stages, folder.name) + step, metrics)


def wait_for_the_other(root: Path, lease_s: float, wait_s: float) -> None:
    """Returns when nobody alive holds the trial's folder, or `wait_s` are over. Tune does not wait for the process that
    it stops: that one may still save. One of another machine may be alive until it gave no sign for `lease_s`."""
    until, told = time.monotonic() + wait_s, False
    while (other := holder(root)) is not None and time.monotonic() < until:
        alive = other.alive()
        if alive is False or (alive is None and age_s(root) > lease_s):
            return
        if not told:
            what = f"process {other.pid} on {other.host} may still save this trial's run"
            print(f"{root}: {what}: waiting for it, {wait_s:.0f} s at most", file=sys.stderr)
        told = True
        time.sleep(LOOK_S if alive else LOOK_FAR_S)
