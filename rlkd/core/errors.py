"""One clear error for everything a user can get wrong: the place, the value and the fix.

Exit codes (reliability_ux.md A3): 0 done · 1 internal error · 2 usage/config · 3 environment/preflight · 4 data ·
5 training diverged · 6 infrastructure budget exhausted · 7 no loadable checkpoint · 75 interrupted, saved: resubmit ·
130 interrupted, the last checkpoint stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

OK, INTERNAL, USAGE, PREFLIGHT, DATA, DIVERGED, INFRASTRUCTURE, NO_CHECKPOINT = range(8)
RESUBMIT, INTERRUPTED = 75, 130


@dataclass(frozen=True)
class Problem:
    """What is wrong, where (`file:line:column`, an option, an actor's name), and what to do about it."""

    code: str
    what: str
    where: str | None = None
    fix: str | None = None
    excerpt: str | None = None  # the line of the file, and a caret under the place; the fix is printed behind it

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.where:
            lines.append(f"  --> {self.where}")
        if self.excerpt:
            lines.append(f"{self.excerpt} {self.fix or ''}".rstrip())
        elif self.fix:
            lines.append(f"  = {self.fix}")
        return "\n".join(lines)


class RlkdError(Exception):
    """An error the user can act on: printed without a traceback, ends the program with `exit_code`.

    It carries one or more problems (config checks report all of them at once), and survives pickling, because it may
    be raised inside an actor or a verifier's child process.
    """

    exit_code = INTERNAL

    def __init__(self, code: str, what: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(code, what, where, fix)
        self.problems: tuple[Problem, ...] = (Problem(code, what, where, fix),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "RlkdError":
        """One error for several problems; `problems` must not be empty."""
        first = problems[0]
        error = cls(first.code, first.what, first.where, first.fix)
        error.problems = tuple(problems)
        return error

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problems))

    def __str__(self) -> str:
        return "\n".join(str(p) for p in self.problems)


def _rebuild(cls: type[RlkdError], problems: tuple[Problem, ...]) -> RlkdError:
    return cls.of(problems)


class ConfigError(RlkdError):
    """The recipe or the command line is wrong (codes RLKD-C…)."""

    exit_code = USAGE


class PreflightError(RlkdError):
    """The machine, cluster, model folder or an installed package is not what the recipe asks for (RLKD-E…)."""

    exit_code = PREFLIGHT


class DataError(RlkdError):
    """Prompts or reward functions are not usable (RLKD-D…)."""

    exit_code = DATA


class DivergedError(RlkdError):
    """Training cannot go on sensibly: a number is not finite, sampler and learner disagree (RLKD-T…)."""

    exit_code = DIVERGED


class InfrastructureError(RlkdError):
    """Workers were lost or stuck more often than the budget allows (RLKD-I…)."""

    exit_code = INFRASTRUCTURE


class NoWorkers(InfrastructureError):
    """None of a pool's workers is left, and none came back in time: the run saves its last whole step and ends."""


class NodesGone(NoWorkers):
    """The same, because their nodes were taken away: the same command continues where there are others."""

    exit_code = RESUBMIT


class BudgetReached(InfrastructureError):
    """A teacher's budget of tokens or money is spent: the run saves its last whole step and ends (RLKD-I720)."""


class CheckpointError(RlkdError):
    """No checkpoint can be loaded where one is asked for (RLKD-K…)."""

    exit_code = NO_CHECKPOINT


class Stopped(Exception):
    """The user or the platform asked the run to stop; `exit_code` is 75 (saved) or 130 (not saved)."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(exit_code, message)
        self.exit_code, self.message = exit_code, message


class WorkerLost(Exception):
    """A stateless worker went away: what it had in hand can be asked for again."""


class LearnerLost(Exception):
    """A learner rank went away: the whole group must be rebuilt from the last checkpoint."""


class SaveFailed(Exception):
    """A checkpoint could not be written; what was committed before stands, and the learner is as it was."""


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word closest to `word`, for "did you mean"; None when nothing is close."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)
