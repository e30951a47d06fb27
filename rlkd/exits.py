"""Why an attempt ended, for programs (exit.json) and for people (a paragraph).

class     done · user (Ctrl-C) · preempt (resubmit) · infra · data · config (the recipe must change) · bug
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.core.errors import (
    DATA,
    DIVERGED,
    INFRASTRUCTURE,
    INTERNAL,
    INTERRUPTED,
    NO_CHECKPOINT,
    OK,
    PREFLIGHT,
    RESUBMIT,
    USAGE,
    BudgetReached,
    RlkdError,
    Stopped,
)
from rlkd.core.stop import StopRequest

CLASSES: Mapping[int, str] = {
    OK: "done",
    INTERNAL: "bug",
    USAGE: "config",
    PREFLIGHT: "config",
    DATA: "data",
    DIVERGED: "config",
    INFRASTRUCTURE: "infra",
    NO_CHECKPOINT: "data",
    RESUBMIT: "preempt",
    INTERRUPTED: "user",
}


@dataclass(frozen=True)
class Exit:
    code: int
    kind: str  # see above; `class` in exit.json
    cause: str
    hint: str | None = None


def of(error: BaseException | None, request: StopRequest | None) -> Exit:
    """What `error` means; `request` is who asked the run to stop, if anybody did."""
    if error is None:
        return Exit(OK, "done", "the last step is done")
    if isinstance(error, Stopped):
        by_user = request is not None and request.kind == "user"
        return Exit(error.exit_code, "user" if by_user else CLASSES[error.exit_code], error.message)
    if isinstance(error, RlkdError):
        kind = "config" if isinstance(error, BudgetReached) else CLASSES[error.exit_code]
        hints = [p.fix for p in error.problems if p.fix]
        return Exit(error.exit_code, kind, "; ".join(f"{p.code}: {p.what}" for p in error.problems), "; ".join(hints))
    if isinstance(error, KeyboardInterrupt):
        return Exit(INTERRUPTED, "user", "interrupted without saving")
    return Exit(INTERNAL, "bug", f"{type(error).__name__}: {error}", "report this with the lines on stderr")


def paragraph(end: Exit, attempt: int, step: int | None, saved: int | None, command: str, record: str) -> str:
    """What happened, what is kept, what to do: three sentences."""
    after = "" if step is None else f" after step {step}"
    kept = "no checkpoint was written" if saved is None else f"the checkpoint of step {saved} stands"
    again = {
        "preempt": "Give the same command again",
        "user": "The same command goes on there",
        "infra": "The same command goes on there, when the machines are well again",
        "bug": "The same command goes on there",
    }.get(end.kind, "When that is mended, the same command goes on there")
    if saved is None:
        again = again.replace("goes on there", "starts again")
    return (
        f"Attempt {attempt} ended{after} ({end.kind}, exit {end.code}); {kept}. {again}:\n  {command}\nMore: {record}"
    )
