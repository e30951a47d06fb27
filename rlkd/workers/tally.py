"""What becomes of a verdict: a reward, a sample left out, or the end of the run. Everything is counted."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from rlkd.core.errors import DataError
from rlkd.core.ports import Answer
from rlkd.core.types import Prompt, Sample
from rlkd.core.verdict import Failure, Outcome, Verdict

OnError = Literal["fail", "drop", "zero"]
Repro = Callable[[Prompt, Answer], str]  # a command that judges an answer again, alone (rlkd.workers.repro)
Mixer = Callable[[Mapping[str, float | None]], tuple[dict[str, float], float]]  # rlkd.rewards.mix.Mix

WINDOW = 1000  # samples over which the share of unjudged ones is taken
ENOUGH = 200  # samples before it says anything
SHOWN = 3  # failures that are logged in full

_FIXES = {
    Outcome.RAISED: "correct the reward",
    Outcome.TIMEOUT: "raise verifier.timeout_s if the reward is right to take this long",
    Outcome.CRASHED: "run the reward on this answer alone under a debugger",
    Outcome.MEMORY: "raise verifier.memory_gib if the reward is right to need this much",
    Outcome.BAD_VALUE: "return one finite number (or None: cannot judge) per answer",
}

log = logging.getLogger("rlkd.rewards")


class Tally:
    """Turns verdicts into samples with rewards, by the recipe's `verifier.on_error`."""

    def __init__(self, mix: Mixer, on_error: OnError, max_error_fraction: float, repro: Repro | None = None) -> None:
        self._repro, self._errors = repro, 0
        self._mix, self._on_error, self._max_error_fraction = mix, on_error, max_error_fraction
        self._counts = Counter[str]()
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._last = ""  # the last failure, in a line

    def count(self, name: str) -> None:
        self._counts[name] += 1

    def counts(self) -> dict[str, int]:
        """Answers by outcome (scored, raised, timeout, crashed, memory, bad_value), and: unjudged (a reward said None),
        recovered (fine when judged again), zeroed (on_error=zero), workers_lost, rechecked and disagreed
        (verifier.recheck_fraction)."""
        more = ("unjudged", "recovered", "zeroed", "workers_lost", "rechecked", "disagreed")
        names = [*(o.value for o in Outcome), *more]
        return {name: self._counts[name] for name in names}

    def settle(
        self, prompt: Prompt, samples: Sequence[Sample], answers: Sequence[Answer], verdicts: Sequence[Verdict]
    ) -> tuple[Sample, ...]:
        """The samples with `scores` and `reward`. DataError RLKD-D301 for a failure if on_error=fail, RLKD-D302 if too
        many samples could not be judged."""
        settled = []
        for sample, answer, verdict in zip(samples, answers, verdicts, strict=True):
            self.count(verdict.outcome.value)
            if verdict.failure is not None:
                settled.append(self._failed(prompt, sample, answer, verdict.failure))
                continue
            if verdict.retried:
                self.count("recovered")
            if verdict.agrees is not None:
                self._rechecked(prompt, answer, verdict)
            scores, reward = self._mix(verdict.scores)
            if math.isnan(reward):
                self.count("unjudged")
                unsure = ", ".join(name for name, s in scores.items() if math.isnan(s))
                self._last = f"`{unsure}` returned None on prompt {prompt.id!r}"
            self._recent.append(math.isnan(reward))
            settled.append(replace(sample, scores=scores, reward=reward))
        self._check()
        return tuple(settled)

    def _rechecked(self, prompt: Prompt, answer: Answer, verdict: Verdict) -> None:
        """A reward that says two things of one answer teaches noise: counted, and said."""
        self.count("rechecked")
        if verdict.agrees:
            return
        self.count("disagreed")
        if self._counts["disagreed"] <= SHOWN:
            log.warning(
                "the rewards gave prompt %r's answer %r the scores %s, and others when asked again: %d of %d answers "
                "judged twice so far (verifier.recheck_fraction)",
                prompt.id,
                answer.text[:200],
                dict(verdict.scores),
                self._counts["disagreed"],
                self._counts["rechecked"],
            )

    def disagreement(self) -> float:
        """The share of answers judged twice that got other scores the second time; NaN if none was."""
        return self._counts["disagreed"] / self._counts["rechecked"] if self._counts["rechecked"] else math.nan

    def _failed(self, prompt: Prompt, sample: Sample, answer: Answer, failure: Failure) -> Sample:
        self._errors += 1
        shown = self._on_error == "fail" or self._errors <= SHOWN
        again = self._repro(prompt, answer) if self._repro is not None and shown else None
        error = failure_error(prompt, answer, failure, again)
        if self._on_error == "fail":
            raise error
        self._recent.append(True)
        self._last = f"`{failure.reward}` {failure.outcome.value} on prompt {prompt.id!r}: {failure.headline}"
        if shown:
            log.warning("%s\n  = counted from here on (%d of %d shown)", error, self._errors, SHOWN)
        if self._on_error == "zero":
            self.count("zeroed")
            return replace(sample, scores={}, reward=0.0)
        return replace(sample, scores={}, reward=math.nan)

    def _check(self) -> None:
        share = sum(self._recent) / max(len(self._recent), 1)
        if len(self._recent) < ENOUGH or share <= self._max_error_fraction:
            return
        counted = ", ".join(f"{name} {n}" for name, n in self.counts().items() if n)
        raise DataError(
            "RLKD-D302",
            f"{sum(self._recent)} of the last {len(self._recent)} answers could not be judged ({share:.1%}); "
            f"verifier.max_error_fraction allows {self._max_error_fraction:.1%}. In all: {counted}",
            where=f"last: {self._last}",
            fix="correct the reward or the rows it cannot judge (`rlkd check` tries it on three), or raise the limit",
        )


def failure_error(prompt: Prompt, answer: Answer, failure: Failure, again: str | None = None) -> DataError:
    """The one error for an answer that a reward failed on: reward, outcome, prompt, answer, its last words, the fix,
    and the command that judges it `again`."""
    what = f"the reward `{failure.reward or '?'}` failed ({failure.outcome.value}) on prompt {prompt.id!r}"
    lines = [what, *(f"    {line}" for line in failure.detail.splitlines()[-8:])]
    if failure.output.strip():
        lines += ["  it printed, at the end:", *(f"    {line}" for line in failure.output.splitlines()[-5:])]
    text = answer.text if len(answer.text) <= 200 else answer.text[:200] + "…"
    fix = f"{_FIXES[failure.outcome]}; verifier.on_error=drop leaves such answers out and counts them"
    fix += f"\n  = to see it alone: {again}" if again else ""
    return DataError("RLKD-D301", "\n".join(lines), where=f"answer {text!r}, to be {prompt.answer!r}", fix=fix)
