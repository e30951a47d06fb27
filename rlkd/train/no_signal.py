"""No learning signal: groups that `credit` turns away, and groups that are trained although nothing can be learned from
them. Too many in a row end the run, or are told; with a table of which prompts they are of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlkd.core.errors import DataError
from rlkd.core.types import TRAINED, Group, Sample

SHARE = "signal/none"  # of a step's groups: those nothing can be learned from
IN_A_ROW = "signal/none_in_a_row"  # such groups, up to the last of the step


@dataclass
class TurnedAway:
    """How many groups were turned away since the last step, by reason. With `stop` too many in a row end the run; else
    the buffer sees to it that the step is made without waiting for more."""

    bound: int
    rates: "PassRates"  # of all groups since then, for advice
    stop: bool = True
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """DataError if that is too many."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self.stop and sum(self.reasons.values()) > self.bound:
            raise _too_many(self._counted(), self.rates)

    def of_step(self, groups: int) -> str:
        """About a step that is made of so few groups, with advice."""
        what = f"made of {groups} groups" if groups else "without any: the weights stay as they are"
        return f"no learning signal: {self._counted()}; this step is {what}\n{self.rates.advice()}"

    def _counted(self) -> str:
        total = sum(self.reasons.values())
        shares = ", ".join(f"{n / total:.0%} {why}" for why, n in sorted(self.reasons.items()))
        return f"{total} groups in a row were turned away ({shares})"

    def clear(self) -> None:
        self.reasons.clear()
        self.rates.clear()


@dataclass
class Barren:
    """Trained groups that nothing can be learned from, as many as came in a row."""

    bound: int
    rates: "PassRates"  # of these groups, for advice
    stop: bool = True
    groups: int = 0

    def step(self, groups: Sequence[Group]) -> dict[str, float]:
        """A step's groups, credited, in their order; its metrics."""
        nothing = [learns_nothing(g) for g in groups]
        for group, none in zip(groups, nothing, strict=True):
            if none:
                self.groups += 1
                self.rates.add(group)
            else:
                self.clear()
        return {SHARE: float(np.mean(nothing)) if nothing else math.nan, IN_A_ROW: float(self.groups)}

    def told(self) -> str | None:
        """What is to be said of too many, once: they are counted anew. DataError if they end the run."""
        if self.groups <= self.bound:
            return None
        counted = f"nothing could be learned from {self.groups} groups in a row (all advantages are 0)"
        if self.stop:
            raise _too_many(counted, self.rates)
        text = f"no learning signal: {counted}; the run goes on\n{self.rates.advice()}"
        self.clear()
        return text

    def clear(self) -> None:
        self.groups = 0
        self.rates.clear()


def learns_nothing(group: Group) -> bool:
    """Whether a credited group moves no weight for what it is: every advantage is 0, `credit` left nothing else for the
    loss, and no teacher said anything of it. Samples without advantages are learned whatever their reward (sft). A KL
    to the reference in the loss, and an entropy bonus, are no signal."""
    return all(s.advantage is not None and not any(part.any() for part in _signals(s)) for s in group.samples)


def _signals(sample: Sample) -> Sequence[np.ndarray]:
    """At its trained tokens: what is not 0 or False there can be learned from. Unknown (NaN) cannot."""
    written = (sample.origin & TRAINED) != 0
    assert sample.advantage is not None
    found = [np.nan_to_num(values[written]) for values in (sample.advantage, *sample.streams.values())]
    if sample.teacher_logp is not None:
        found.append(~np.isnan(sample.teacher_logp[:, written]))
    if sample.teacher_topk is not None:
        found.append(~np.isnan(sample.teacher_topk.logp[written]))
    return found


def _too_many(counted: str, rates: "PassRates") -> DataError:
    what = f"no learning signal: {counted}"
    return DataError("RLKD-D020", what, where="schedule.max_turned_away", fix=rates.advice())


@dataclass
class PassRates:
    """Of the groups since `clear`, by where their prompts come from: what to say when none gives a signal."""

    success: float = 0.5  # a reward above this is right
    samples: int = 0  # how many answers a prompt gets
    _seen: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # by source: right and judged of each group

    def add(self, group: Group) -> None:
        """A group, trained or not."""
        self.samples = len(group.own)
        judged = [s for s in group.own if not math.isnan(s.reward)]
        right = sum(s.reward > self.success for s in judged)
        for name in _kinds(group):
            self._seen.setdefault(name, []).append((right, len(judged)))

    def clear(self) -> None:
        self._seen.clear()

    def advice(self) -> str:
        """A table, hardest first, and what to try."""
        rows = sorted(((_rate(groups), name, groups) for name, groups in self._seen.items()), key=lambda r: r[:2])
        lines = [f"{'prompts of':<24} {'groups':>6} {'pass':>6} {'all right':>9} {'all wrong':>9}"]
        for rate, name, groups in rows[:12]:
            right = sum(r == n for r, n in groups if n) / len(groups)
            wrong = sum(r == 0 for r, n in groups if n) / len(groups)
            passed = "–" if math.isnan(rate) else f"{rate:.0%}"
            lines.append(f"{name[:24]:<24} {len(groups):>6} {passed:>6} {right:>9.0%} {wrong:>9.0%}")
        if len(rows) > 12:
            lines.append(f"… and {len(rows) - 12} more")
        return "\n".join([*lines, _try(_rate([g for _, _, groups in rows for g in groups]), self.samples)])


def _kinds(group: Group) -> list[str]:
    """What a prompt counts under: its source, or the level its row names."""
    source = group.prompt.source or "all"
    level = next((group.prompt.metadata[k] for k in ("difficulty", "level") if k in group.prompt.metadata), None)
    return [source if level is None else f"{source}, {level}"]


def _rate(groups: Sequence[tuple[int, int]]) -> float:
    judged = sum(n for _, n in groups)
    return sum(r for r, _ in groups) / judged if judged else math.nan


def _try(rate: float, samples: int) -> str:
    if math.isnan(rate):
        return "no answer could be judged: see the reward (`rlkd check` tries it on three rows)"
    more = f"algorithm.rollout.samples={2 * samples}"
    band = "curriculum.name=difficulty leaves out what is too easy or too hard by now"
    if rate < 0.1:
        return f"too hard: take easier prompts, a stage of sft first, or {more}; {band}"
    if rate > 0.9:
        return f"too easy: take harder prompts, or {more}; {band}"
    return f"each prompt is always right or always wrong: {more}, a higher sampler.temperature; {band}"
