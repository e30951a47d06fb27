"""What the numbers of a run say of its health. Pure: facts of a step in, sentences out.

mismatch    sampler and learner disagree on the log-probs of the sampled tokens: a warning, then the end (code 5)
alarms      answers get much longer, entropy collapses, answers repeat themselves, many are cut, reward comes from
            one part alone, nothing is left to learn from: advice, nothing is changed by itself
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import DivergedError
from rlkd.core.types import Finish, Group, Sample
from rlkd.train.no_signal import SHARE, PassRates

FIRST = 10  # steps that later ones are compared with
LAST = 5  # steps of which the mean is compared
EVERY = 20  # steps between two alarms of one kind
NGRAM = 4  # tokens
SPREAD = "health/spread/"
NO_SIGNAL = "no_signal"  # the alarm that comes with advice
FACTOR = 20.0  # the largest difference may be so many times the mean's bound


@dataclass(frozen=True)
class Bounds:
    """In nats; inf: off."""

    mismatch_warn: float  # of the mean |log-prob of the sampler − log-prob of the learner|
    mismatch_stop: float
    canary: float  # the same on fixed tokens, after a weight sync


# float32: 1e-6 … 1e-4 was seen between vLLM and the learner on CPU. bfloat16 has 8 bits: a few hundredths are rounding.
DEFAULTS = {"float32": Bounds(1e-3, 0.1, 0.01), "bfloat16": Bounds(0.05, 0.5, 0.2)}


def bounds(dtype: str, warn: float | None, stop: float | None, canary: float | None) -> Bounds:
    """The recipe's (None: by `dtype`; 0: off)."""
    default = DEFAULTS[dtype]

    def chosen(wanted: float | None, otherwise: float) -> float:
        return otherwise if wanted is None else wanted or math.inf

    return Bounds(
        chosen(warn, default.mismatch_warn), chosen(stop, default.mismatch_stop), chosen(canary, default.canary)
    )


@dataclass(frozen=True)
class Facts:
    """Of one step; NaN for what is not known."""

    step: int
    length: float  # mean tokens of the policy's answers
    truncated: float  # share of them cut at the length limit
    repetition: float  # share of their 4-grams that were there before in the same answer
    entropy: float  # nats
    reward: float  # mean
    spread: Mapping[str, float]  # standard deviation of each part of the reward
    mismatch: float = math.nan  # mean, nats
    mismatch_max: float = math.nan
    nothing: float = math.nan  # share of the groups that nothing can be learned from (train/no_signal.py)

    def row(self) -> dict[str, float]:
        """What of it a step's metrics do not have anyway, for `of_row`."""
        own = {f"health/{name}": getattr(self, name) for name in ("length", "truncated", "repetition", "reward")}
        return own | {f"{SPREAD}{name}": value for name, value in self.spread.items()}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Facts":
        """From a row of metrics.jsonl. What it does not know is NaN."""

        def of(name: str) -> float:
            value = row.get(name)
            return math.nan if value is None else float(value)

        return cls(
            step=int(row["step"]),
            length=of("health/length"),
            truncated=of("health/truncated"),
            repetition=of("health/repetition"),
            entropy=of("entropy"),
            reward=of("health/reward"),
            spread={name.removeprefix(SPREAD): of(name) for name in row if name.startswith(SPREAD)},
            mismatch=of("mismatch/mean"),
            mismatch_max=of("mismatch/max"),
            nothing=of(SHARE),
        )


@dataclass(frozen=True)
class Alarm:
    kind: str
    text: str


def facts_of(step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> Facts:
    """From the trained groups, and the learner's numbers."""
    own = [s for g in groups for s in g.own]
    parts: dict[str, list[float]] = defaultdict(list)
    for sample in own:
        for name, score in sample.scores.items():
            parts[name].append(score)
    return Facts(
        step=step,
        length=_mean([float(s.answer_tokens) for s in own]),
        truncated=_mean([float(s.finish is Finish.LENGTH) for s in own]),
        repetition=_mean([repetition(_answer(s)) for s in own]),
        entropy=metrics.get("entropy", math.nan),
        reward=_mean([s.reward for s in own]),
        spread={name: float(np.std(scores)) for name, scores in parts.items()},
        mismatch=metrics.get("mismatch/mean", math.nan),
        mismatch_max=metrics.get("mismatch/max", math.nan),
        nothing=metrics.get(SHARE, math.nan),
    )


def repetition(tokens: Int32[np.ndarray, "_"]) -> float:
    """Share of n-grams that came before in the same answer; 0 for one without n-grams."""
    if len(tokens) < NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def _answer(sample: Sample) -> Int32[np.ndarray, "_"]:
    return sample.tokens[len(sample.tokens) - sample.answer_tokens :]


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


# --- mismatch


def mismatch_alarm(now: Facts, limits: Bounds) -> Alarm | None:
    """None, or a warning. DivergedError above the second bound, and for what is no number at all."""
    if math.isnan(now.mismatch) and math.isnan(now.mismatch_max):
        return None  # a step without samples of the policy
    text = (
        f"step {now.step}: sampler and learner differ by {now.mismatch:.3g} nats on average "
        f"(largest {now.mismatch_max:.3g})"
    )
    if now.mismatch > limits.mismatch_stop or now.mismatch_max > FACTOR * limits.mismatch_stop:
        raise DivergedError(
            "RLKD-T143",
            f"{text}; health.mismatch_stop={limits.mismatch_stop:g}",
            where="health.mismatch_stop",
            fix="the sampler does not write with the weights that are trained, or with other arithmetic: try "
            "sampler.engine=hf, model.dtype=float32, sampler.prefix_caching=false one at a time; with "
            "schedule.staleness > 0 part of it is the policy's own change",
        )
    if now.mismatch > limits.mismatch_warn or now.mismatch_max > FACTOR * limits.mismatch_warn:
        return Alarm("mismatch", f"{text}; health.mismatch_warn={limits.mismatch_warn:g}")
    return None


# --- alarms


@dataclass(frozen=True)
class Limits:
    """When an alarm is raised. 0: never."""

    length_growth: float = 2.0  # × the mean of the first steps
    entropy_share: float = 0.1  # of that of the first steps: below is a collapse
    repetition: float = 0.3  # share of repeated 4-grams
    truncated: float = 0.2  # share of answers


def alarms(history: Sequence[Facts], limits: Limits) -> list[Alarm]:
    """What the last steps say, beside the first ones. `history` is of all steps so far, in order."""
    if len(history) < LAST:
        return []
    first, last = history[:FIRST], history[-LAST:]
    step = history[-1].step
    found: list[Alarm] = []

    def of(name: str, steps: Sequence[Facts]) -> float:
        return _mean([float(getattr(f, name)) for f in steps])

    cut = of("truncated", last)
    if limits.truncated and cut > limits.truncated:
        text = f"{cut:.0%} of the answers are cut at sampler.max_tokens: what they say at the end is never seen"
        found.append(Alarm("truncated", f"step {step}: {text}; raise it, or reward short answers"))
    again = of("repetition", last)
    if limits.repetition and again > limits.repetition:
        text = f"{again:.0%} of the answers' 4-grams are repetitions"
        found.append(Alarm("repetition", f"step {step}: {text}; look at samples/, and at the repetition reward"))
    if all(f.nothing == 1.0 for f in last):
        text = f"nothing could be learned from any group of the last {LAST} steps: all advantages are 0"
        found.append(Alarm(NO_SIGNAL, f"step {step}: {text}"))
    if len(history) < FIRST + LAST:
        return found
    length, before = of("length", last), of("length", first)
    if limits.length_growth and length > limits.length_growth * before:
        text = f"answers have {length:.0f} tokens, {length / before:.1f} × those of the first {FIRST} steps"
        rose = of("reward", last) - of("reward", first)
        found.append(Alarm("length", f"step {step}: {text}; the reward rose by {rose:+.3g} meanwhile"))
    entropy, start = of("entropy", last), of("entropy", first)
    if limits.entropy_share and start > 0 and entropy < limits.entropy_share * start:
        text = f"entropy fell from {start:.3g} to {entropy:.3g} nats: samples of a prompt become the same"
        found.append(Alarm("entropy", f"step {step}: {text}; a lower learner.lr or a higher clip keep it up"))
    return found + _one_part(step, first, last)


def _one_part(step: int, first: Sequence[Facts], last: Sequence[Facts]) -> list[Alarm]:
    """One part of the reward still differs from answer to answer and the others, which did, do not any more: whatever
    is learned now is learned from it alone."""
    names = list(last[-1].spread)
    if len(names) < 2:
        return []

    def spread(name: str, steps: Sequence[Facts]) -> float:
        return _mean([f.spread.get(name, math.nan) for f in steps])

    alive = [n for n in names if spread(n, last) > 1e-6]
    died = [n for n in names if n not in alive and spread(n, first) > 1e-6]
    if len(alive) != 1 or not died:
        return []
    text = (
        f"only the reward `{alive[0]}` differs between answers; {', '.join(f'`{n}`' for n in died)} does not any more"
    )
    return [Alarm("one_part", f"step {step}: {text}: see that it is the one you want learned")]


@dataclass
class Alarms:
    """Of a run: the loop's one call a step. At most one of a kind in EVERY steps."""

    bounds: Bounds
    limits: Limits = field(default_factory=Limits)
    past: Callable[[], Iterable[Mapping[str, Any]]] = tuple  # the rows of metrics.jsonl, ascending
    history: list[Facts] = field(default_factory=list)
    rates: PassRates = field(default_factory=PassRates)  # of the steps in a row that nothing could be learned from
    _raised: dict[str, int] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """The run goes on after this step, in this process or a new one: compare with the same steps as before."""
        known = {f.step: f for f in (*map(Facts.of_row, self.past()), *self.history)}
        self.history = [known[s] for s in sorted(known) if s <= step]
        self.rates.clear()

    def row(self) -> dict[str, float]:
        """Of the last step, for its row: what `begin` needs later."""
        return self.history[-1].row() if self.history else {}

    def step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> list[Alarm]:
        """What is to be told after this step. DivergedError as `mismatch_alarm`. A step that is done again replaces
        what came after it."""
        self.history = [f for f in self.history if f.step < step]
        now = facts_of(step, groups, metrics)
        self.history.append(now)
        if now.nothing < 1.0:
            self.rates.clear()
        for group in groups if now.nothing == 1.0 else ():
            self.rates.add(group)
        mismatch = mismatch_alarm(now, self.bounds)
        found = [*([mismatch] if mismatch else []), *alarms(self.history, self.limits)]
        found = [replace(a, text=f"{a.text}\n{self.rates.advice()}") if a.kind == NO_SIGNAL else a for a in found]
        due = [a for a in found if not 0 <= step - self._raised.get(a.kind, -EVERY) < EVERY]
        self._raised |= {a.kind: step for a in due}
        return due
