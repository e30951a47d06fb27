"""What a run tells, in its directory, on the terminal and to trackers:

    metrics.jsonl           one row a step: the source of truth (report/metrics.py has the names)
    samples/step-….jsonl    a few groups of a step, readable
    eval/step-….json        held-out evaluations
    ledger.jsonl            what a step did with every prompt it took: trained, or turned away and why
    events.jsonl            warnings, lost workers, saves, waits
    reward.svg              the reward curve, at the end

Every file is append-only or replaced whole, and read back by report/history.py. Durations come from the monotonic
clock; wall time is only recorded.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlkd.core.types import Group
from rlkd.report import plot, samples
from rlkd.report.files import Lines, as_json, replace_file
from rlkd.report.history import History
from rlkd.report.isolated import Isolated
from rlkd.report.metrics import Observed, newest_version, of_batch
from rlkd.report.progress import Progress
from rlkd.report.summary import summary

OUTSIDE = ("evaluate", "save")  # stages that are not part of what a step takes
SILENT = ("checkpoint",)  # kinds of events that are not shown
BURST, BURST_S = 5, 10.0  # at most so many events of one kind are shown in so many seconds


@runtime_checkable
class Estimate(Protocol):
    """One pass@k with its 95 % interval (train/passk.py)."""

    @property
    def k(self) -> int: ...
    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def prompts(self) -> int: ...
    @property
    def left_out(self) -> int: ...
    @property
    def interval(self) -> str: ...


@runtime_checkable
class Resolved(Protocol):
    """A prompt's end (train/ledger.py)."""

    @property
    def ticket(self) -> int: ...
    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def what(self) -> str: ...
    @property
    def samples(self) -> int: ...


@runtime_checkable
class Evaluated(Protocol):
    """A held-out evaluation's result (train/passk.py)."""

    @property
    def estimates(self) -> Sequence[Any]: ...  # of Estimate
    def metrics(self) -> dict[str, float]: ...


@dataclass
class Report:
    """All of it, for one attempt of a run. Used from one thread. OSError if the directory cannot be written to."""

    directory: Path
    decode: samples.Decode
    steps: int
    samples_per_step: int = 4  # groups written out; 0: none
    success: float = 0.5  # a reward above this is right
    attempt: int = 1
    sinks: list[Isolated] = field(default_factory=list)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._step_began: float | None = None
        self._observed = Observed(self.success)
        self._shown: dict[str, list[float]] = defaultdict(list)
        self._unshown: dict[str, int] = defaultdict(int)
        self._complained = False
        self._closed = False
        self._events = Lines(self.directory / "events.jsonl")
        self._metrics = Lines(self.directory / "metrics.jsonl")
        self._ledger = Lines(self.directory / "ledger.jsonl")
        for lines in (self._events, self._metrics, self._ledger):
            if lines.cut is not None:
                self.event("warning", f"{lines.path.name}: an unfinished last line was taken out", line=lines.cut)

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None:
        """A group has its rewards, `seconds` per stage after it began; it may yet be turned away."""
        if self._step_began is None:
            self._step_began = time.monotonic() - sum(seconds.values())
        self._observed.add(group, seconds)
        if self.progress is not None:
            self.progress.group()

    def step(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> None:
        """An optimizer step is done, the `step`-th of the run. `groups` were trained, `metrics` are what learner,
        algorithm and loop have to say, `timings` seconds of wall time per stage since the step before."""
        row = self._row(step, groups, metrics, timings)
        infinite = sorted(name for name, v in row.items() if isinstance(v, float) and math.isinf(v))
        if infinite:  # null in the file, like what is unknown
            self.event("warning", f"step {step}: infinite: {', '.join(infinite)}", step=step)
        self._metrics.write(row)
        self._complain()
        self._write_samples(step, groups)
        self._feed(step, row)
        if self.progress is not None:
            self.progress.step(row, self._one_sample(step, groups))

    def resolved(self, step: int, rows: Sequence[Resolved]) -> None:
        """What the step did with the prompts it took (train/ledger.py)."""
        told = [[r.ticket, r.prompt, r.seed, r.what, r.samples] for r in rows]
        self._ledger.write({"step": step, "attempt": self.attempt, "rows": told})

    def evaluation(self, step: int, result: Evaluated) -> None:
        """A held-out evaluation of the policy after `step` steps."""
        names = ("k", "value", "low", "high", "prompts", "left_out", "interval")
        estimates = [{name: getattr(e, name) for name in names} for e in result.estimates]
        record = {"step": step, **self._stamp(), "estimates": estimates, **result.metrics()}
        self._try(lambda: replace_file(self.directory / "eval" / f"step-{step:06d}.json", as_json(record) + "\n"))
        self._feed(step, result.metrics())
        shown = " · ".join(str(e) for e in result.estimates)
        if self.progress is not None and not math.isnan(first := _pass_at_1(result.estimates)):
            self.progress.evaluated(first)
        self.say(f"held out after step {step}: {shown}")

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Something that is not a metric. A flood of one kind is shown only in part, and kept whole in events.jsonl."""
        if kind == "unjudged":
            self._observed.unjudged += int(fields.get("samples", 1))
        if not self._closed:
            self._events.write({**fields, "kind": kind, "text": text, **self._stamp()})
        if kind in SILENT:
            return
        now = time.monotonic()
        recent = self._shown[kind] = [t for t in self._shown[kind] if now - t < BURST_S]
        if len(recent) >= BURST:
            self._unshown[kind] += 1
            return
        recent.append(now)
        more = self._unshown.pop(kind, 0)
        self.say(f"[{kind}] {text}" + (f"   (and {more} more before, see events.jsonl)" if more else ""))

    def say(self, text: str) -> None:
        """A line on the terminal, kept nowhere."""
        if self.progress is not None:
            self.progress.say(text)

    def summary(self, model: Path | None = None) -> str:
        """The end of the run for stdout: curve, before and after, speed, where things are (report/summary.py)."""
        if self.progress is not None:
            self.progress.close()
        self._picture()
        width = min(100, self.progress.width if self.progress is not None else 72)
        return summary(self.directory, model, width, sys.stdout.encoding)

    def close(self) -> None:
        """Finish sinks and files. Takes as long as the slowest sink may (30 s). Can be called twice."""
        if self._closed:
            return
        if self.progress is not None:
            self.progress.close()
        for sink in self.sinks:
            sink.close()
        self._picture()
        for kind, n in self._unshown.items():
            self.say(f"[{kind}] {n} more, see events.jsonl")
        self._closed = True
        for lines in (self._metrics, self._ledger, self._events):
            lines.close()
            if lines.held or lines.lost:
                self.say(f"[warning] {lines.held + lines.lost} rows could not be written: {lines.problem}")

    def _row(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> dict[str, Any]:
        now = time.monotonic()
        row: dict[str, Any] = {"step": step, "version": newest_version(groups), **self._stamp()}
        row |= {**self._observed.row(), **of_batch(groups)}
        row |= {f"seconds/{stage}": s for stage, s in timings.items()}
        outside = sum(timings.get(stage, 0.0) for stage in OUTSIDE)
        took = math.nan if self._step_began is None else max(0.0, now - self._step_began - outside)
        row["seconds/step"] = took
        row["samples_per_second"] = row["batch/samples"] / took if took > 0 else math.nan
        row["tokens_per_second"] = row["batch/tokens"] / took if took > 0 else math.nan
        self._step_began, self._observed = now, Observed(self.success)
        return row | {f"learner/{name}" if name in row else name: value for name, value in metrics.items()}

    def _stamp(self) -> dict[str, Any]:
        """When: wall time for the record, seconds of this attempt for calculating, and which attempt."""
        wall = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        return {"time": wall, "elapsed": time.monotonic() - self._began, "attempt": self.attempt}

    def _write_samples(self, step: int, groups: Sequence[Group]) -> None:
        shown = samples.shown(groups, self.samples_per_step)
        if shown:
            path = self.directory / "samples" / f"step-{step:06d}.jsonl"
            self._try(lambda: samples.write_samples(path, step, shown, self.decode))

    def _one_sample(self, step: int, groups: Sequence[Group]) -> Mapping[str, Any] | None:
        """Another prompt and another place in its group from step to step, so that good and bad ones are seen."""
        groups = [g for g in groups if g.samples]
        if not groups:
            return None
        group = groups[step % len(groups)]
        return samples.one_line(group, group.samples[step % len(group.samples)], self.decode, self.success)

    def _feed(self, step: int, row: Mapping[str, Any]) -> None:
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        numbers.pop("step", None)
        for sink in self.sinks:
            sink.write(step, numbers)

    def _picture(self) -> None:
        try:
            history = History.read(self.directory)
        except (ValueError, KeyError) as broken:  # a file was changed by somebody else
            self.event("warning", f"no reward.svg: {broken}")
            return
        if history.rows or history.evaluations:
            self._try(lambda: replace_file(self.directory / "reward.svg", plot.svg(history, self.directory.name)))

    def _try(self, write: Callable[[], None]) -> None:
        """Write a file that the run can do without; say so if that does not work."""
        try:
            write()
        except OSError as e:
            self.event("warning", f"{e.filename or self.directory}: {e.strerror}; the run goes on")

    def _complain(self) -> None:
        """Say once when the disk stops taking metrics, and once when it takes them again."""
        problem = self._metrics.problem
        if problem is not None and not self._complained:
            self.event("warning", f"{problem}; rows are held in memory, and written as soon as that works")
        elif problem is None and self._complained:
            self.event("warning", "metrics are written again, with all rows that were held")
        self._complained = problem is not None


def _pass_at_1(estimates: Sequence[Estimate]) -> float:
    return next((float(e.value) for e in estimates if e.k == 1), math.nan)
