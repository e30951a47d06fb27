"""What a run tells: metrics, samples, evaluations, events, the terminal, trackers.

metrics.jsonl          one row a step: the source of truth
samples/step-…jsonl    a few groups of a step, readable
eval/step-…json        held-out evaluations
events.jsonl           warnings, lost workers, saves, waits
reward.svg             the reward curve, at the end
"""

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlkd.core.types import Finish, Group
from rlkd.report import plot
from rlkd.report.files import Lines, plain, read_lines, replace_file, write_samples
from rlkd.report.progress import Progress
from rlkd.report.sinks import Isolated


@runtime_checkable
class Evaluated(Protocol):
    """A held-out evaluation's result (train/passk.py)."""

    @property
    def pass_at(self) -> Mapping[int, Any]: ...
    def metrics(self) -> dict[str, float]: ...


@dataclass
class Observed:
    """What came from the rollout workers since the last step, trained or not."""

    groups: int = 0
    outcomes: dict[str, int] = field(default_factory=lambda: {"all_right": 0, "all_wrong": 0, "mixed": 0})
    rollout_s: list[float] = field(default_factory=list)

    def add(self, group: Group, seconds: Mapping[str, float], success: float) -> None:
        self.groups += 1
        right = [s.reward > success for s in group.samples]
        kind = "all_right" if all(right) else "all_wrong" if not any(right) else "mixed"
        self.outcomes[kind] += 1
        self.rollout_s.append(seconds.get("rollout", math.nan))

    def row(self) -> dict[str, float]:
        if not self.groups:
            return {}
        shares = {f"groups/{kind}": n / self.groups for kind, n in self.outcomes.items()}
        return {"groups/finished": float(self.groups), **shares, "rollout/group_s": statistics.mean(self.rollout_s)}


@dataclass
class Report:
    """All of it, for one attempt of a run in `directory`."""

    directory: Path
    decode: Callable[[np.ndarray], str]
    steps: int
    samples_per_step: int = 4
    success: float = 0.5
    attempt: int = 1
    sinks: list[Isolated] = field(default_factory=list)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.history = _upto_last(read_lines(self.directory / "metrics.jsonl"))
        self._metrics = Lines(self.directory / "metrics.jsonl")
        self._events = Lines(self.directory / "events.jsonl")
        self._observed = Observed()
        self._began = self._last = time.monotonic()
        self._samples = 0
        self.evaluations: dict[int, Evaluated] = {}

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None:
        """A group has its rewards; it may yet be turned away."""
        self._observed.add(group, seconds, self.success)

    def step(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> None:
        """An optimizer step is done; `timings` are seconds per stage."""
        now = time.monotonic()
        row = {
            **_of_samples(groups),
            **self._observed.row(),
            **metrics,
            **{f"seconds/{stage}": s for stage, s in timings.items()},
            "seconds": now - self._last,
        }
        self._last, self._observed = now, Observed()
        self._samples += sum(len(g.samples) for g in groups)
        stamp = {"step": step, "attempt": self.attempt, "time": time.time(), "elapsed": now - self._began}
        self._metrics.write({**row, **stamp})
        self.history.append({**row, **stamp})
        if self.samples_per_step:
            path = self.directory / "samples" / f"step-{step:06d}.jsonl"
            write_samples(path, groups[: self.samples_per_step], self.decode)
        for sink in self.sinks:
            sink.write(step, {k: v for k, v in row.items() if math.isfinite(v)})
        if self.progress is not None:
            self.progress.step(step, row, timings, self._one_sample(groups))

    def evaluation(self, step: int, result: Evaluated) -> None:
        self.evaluations[step] = result
        replace_file(
            self.directory / "eval" / f"step-{step:06d}.json", json.dumps(plain({"step": step, **result.metrics()}))
        )
        for sink in self.sinks:
            sink.write(step, {k: v for k, v in result.metrics().items() if math.isfinite(v)})
        estimates = ", ".join(f"pass@{k} {e}" for k, e in result.pass_at.items())
        self.say(f"held out after step {step}: {estimates}")
        self._last = time.monotonic() if step == 0 else self._last

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Something that is not a metric: kept in events.jsonl; warnings are also shown."""
        self._events.write({"kind": kind, "text": text, "time": time.time(), "attempt": self.attempt, **fields})
        if kind not in ("checkpoint",):
            self.say(f"[{kind}] {text}")

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        for sink in self.sinks:
            sink.close()
        if self.history:
            replace_file(self.directory / "reward.svg", plot.svg(*self.curve(), title=self.directory.name))
        self._metrics.close()
        self._events.close()

    def curve(self) -> tuple[list[int], list[float], dict[int, float]]:
        """Steps, their mean training reward, and held-out pass@1 by step."""
        evals = {step: float(r.pass_at[1].value) for step, r in self.evaluations.items() if 1 in r.pass_at}
        rewards = [math.nan if row["reward/mean"] is None else float(row["reward/mean"]) for row in self.history]
        return [int(row["step"]) for row in self.history], rewards, evals

    def summary(self) -> str:
        """The end of the run, for people: the curve, pass@1 before and after, seconds by stage, where things are."""
        lines = []
        if len(self.history) > 1:
            lines.append(plot.terminal(*self.curve()))
        lines += self._before_and_after()
        by_stage: dict[str, list[float]] = defaultdict(list)
        for row in self.history:
            for name, value in row.items():
                if name.startswith("seconds/") and value is not None:
                    by_stage[name.removeprefix("seconds/")].append(float(value))
        if self.history:
            each = statistics.median(float(row["seconds"]) for row in self.history)
            parts = ", ".join(f"{stage} {statistics.median(v):.2f}" for stage, v in sorted(by_stage.items()))
            elapsed = self._last - self._began
            lines.append(f"seconds per step (median): {each:.2f} — {parts}")
            lines.append(
                f"{self._samples:,} samples trained in {elapsed:.0f} s ({self._samples / elapsed:.1f} a second)"
            )
        lines.append(f"run directory: {self.directory} (metrics.jsonl, samples/, eval/, reward.svg, checkpoints/)")
        return "\n".join(lines)

    def _before_and_after(self) -> list[str]:
        if not self.evaluations:
            return []
        first, last = min(self.evaluations), max(self.evaluations)
        lines = []
        for k, before in self.evaluations[first].pass_at.items():
            after = self.evaluations[last].pass_at[k]
            text = f"pass@{k} on {before.prompts} held-out prompts: {before}"
            if last != first:
                apart = "do not overlap" if after.low > before.high or before.low > after.high else "overlap"
                text += f" → {after}   (95 % intervals {apart})"
            lines.append(text)
        return lines

    def _one_sample(self, groups: Sequence[Group]) -> str:
        group = groups[0]
        sample = group.samples[0]
        text = self.decode(sample.tokens[-sample.answer_tokens :])
        question = (group.prompt.text or self.decode(group.prompt.tokens)).strip().replace("\n", " ")
        return f"“{question}” → “{text.strip()}”  reward {sample.reward:.2f}".replace("\n", " ")


def _of_samples(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the step's samples."""
    samples = [s for g in groups for s in g.samples]
    rewards = np.array([s.reward for s in samples])
    lengths = np.array([s.answer_tokens for s in samples])
    row = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "truncated": sum(s.finish == Finish.LENGTH for s in samples) / len(samples),
        "guided": sum(s.guided for s in samples) / len(samples),
        "samples": float(len(samples)),
        "tokens": float(sum(len(s.tokens) for s in samples)),
    }
    for name in samples[0].scores:
        row[f"score/{name}"] = float(np.mean([s.scores.get(name, math.nan) for s in samples]))
    return row


def _upto_last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of earlier attempts, each step once: the latest attempt's."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        for later in [s for s in by_step if s >= row["step"]]:
            del by_step[later]  # a resumed run did these steps again
        by_step[row["step"]] = row
    return [by_step[s] for s in sorted(by_step)]
