"""What the verifier's jail says of one answer: its scores, or why there are none. Light: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How judging an answer ended. Every failure has a name of its own; none of them is a score of 0."""

    SCORED = "scored"
    RAISED = "raised"  # the reward raised an exception
    TIMEOUT = "timeout"  # it did not end in time
    CRASHED = "crashed"  # its process died: a signal, os._exit
    MEMORY = "memory"  # it asked for more memory than it may have
    BAD_VALUE = "bad_value"  # it gave something that is no score: NaN, inf, a string, the wrong number of them


@dataclass(frozen=True)
class Failure:
    """Why an answer has no scores."""

    outcome: Outcome
    reward: str | None  # the name of the reward that was running, if one was
    detail: str  # the traceback, the signal, the value
    output: str = ""  # the end of what the process printed

    @property
    def headline(self) -> str:
        """The detail's last line that says something: of a traceback, the exception."""
        lines = [line for line in self.detail.splitlines() if line.strip()]
        return lines[-1].strip() if lines else self.outcome.value


@dataclass(frozen=True)
class Verdict:
    """The scores of one answer by reward name (None: that reward could not judge it), or a failure and no scores."""

    scores: Mapping[str, float | None] = field(default_factory=dict)
    failure: Failure | None = None
    retried: bool = False  # the group was judged again in a fresh process
    agrees: bool | None = (
        None  # a second judging gave the same scores; None: there was none (verifier.recheck_fraction)
    )

    @property
    def outcome(self) -> Outcome:
        return Outcome.SCORED if self.failure is None else self.failure.outcome
