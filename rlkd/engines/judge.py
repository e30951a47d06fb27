"""One group scored by every reward in turn, inside a child of the jail: what is caught there, and how it is named."""

import math
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rlkd.core.types import Answer, Prompt
from rlkd.core.verdict import Outcome

LARGEST = 1e6  # a score beyond this is a mistake, not a score
_TEXT = 16_384  # characters of a traceback
_FRAMES = 20  # of a traceback, the innermost


class _Overtime(BaseException):
    """No Exception, so that a reward's `except Exception` does not swallow it."""


class _BadValue(Exception):
    """What a reward gave back is no list of scores."""


def judge(
    rewards: Mapping[str, Any],
    prompt: Prompt,
    answers: Sequence[Answer],
    limit_s: float,
    running: Callable[[str], None],
) -> dict[str, Any]:
    """{"scores": {name: [score or None, …]}}, or {"outcome", "reward", "detail"} of the first reward that failed.

    `running` is told each reward's name before it starts, for the case that this process does not live to tell.
    """
    name = ""
    scores: dict[str, list[float | None]] = {}
    try:
        with _alarm(limit_s):
            for name, reward in rewards.items():
                running(name)
                scores[name] = _checked(reward.score(prompt, answers), len(answers))
    except _Overtime as e:
        return _failure(Outcome.TIMEOUT, name, f"did not end within {limit_s:g} s; it was here:\n{_where(e)}")
    except MemoryError as e:
        return _failure(Outcome.MEMORY, name, f"{_where(e)}\nwanted more memory than verifier.memory_gib allows")
    except _BadValue as e:
        return _failure(Outcome.BAD_VALUE, name, str(e))
    except BaseException as e:  # SystemExit too: a verifier must not end its process
        return _failure(Outcome.RAISED, name, _where(e))
    return {"scores": scores}


def _failure(outcome: Outcome, reward: str, detail: str) -> dict[str, Any]:
    return {"outcome": outcome.value, "reward": reward, "detail": detail[-_TEXT:]}


def _where(error: BaseException) -> str:
    """The traceback without our own outermost frame; of an overtime, only the places."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    if isinstance(error, _Overtime):
        return "".join(traceback.format_tb(inner, limit=-_FRAMES)).rstrip()
    return "".join(traceback.format_exception(type(error), error, inner, limit=-_FRAMES)).rstrip()


@contextmanager
def _alarm(limit_s: float) -> Iterator[None]:
    """Raises _Overtime in the main thread after `limit_s` seconds, once."""

    def ring(*_: object) -> None:
        raise _Overtime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _checked(values: object, n: int) -> list[float | None]:
    """`n` finite numbers or None. _BadValue says what it is instead."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise _BadValue(f"score() gave {_brief(values)}; expected a list of {n} numbers, one per answer")
    listed = list(values)
    if len(listed) != n:
        raise _BadValue(f"score() gave {len(listed)} values for {n} answers: {_brief(listed)}")
    return [_number(v) for v in listed]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    plain = value
    if hasattr(value, "item"):  # a scalar of numpy or torch
        with suppress(ValueError, RuntimeError):
            plain = value.item()
    if not isinstance(plain, int | float):
        raise _BadValue(f"score() gave {_brief(value)} of type {type(value).__name__}; expected a number or None")
    if abs(plain) > LARGEST or not math.isfinite(plain):
        raise _BadValue(f"score() gave {_brief(plain)}; expected a finite number within ±{LARGEST:g}, or None")
    return float(plain)


def _brief(value: object) -> str:
    try:
        text = repr(value)
    except Exception as e:  # Python refuses to write integers of more than 4300 digits
        text = f"a {type(value).__name__} whose repr raises {type(e).__name__}"
    return text if len(text) <= 200 else text[:200] + "…"
