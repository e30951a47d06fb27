"""The driver of a submitted job: `rlkd train`, and a last line that says how it ended (ending.py).

    python -m rlkd.submit.entry RUN_FOLDER RECIPE KEY=VALUE…

A SIGTERM before the run has begun, or after it has ended, finds nothing to save: exit 75 at once, or no difference.
"""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from rlkd.core.errors import INTERNAL, OK, RESUBMIT

_RECORDS = ("attempts/*/exit.json", "*/attempts/*/exit.json")  # of the run, or of its stages


class _TooEarly(SystemExit):
    """SIGTERM while nothing is trained yet."""


def main(arguments: list[str]) -> int:
    """The exit code of `rlkd train` in this process."""
    folder, recipe, *overrides = arguments
    signal.signal(signal.SIGTERM, _early)
    before, code = _records(Path(folder)), INTERNAL
    try:
        code = _train(recipe, overrides)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _say(code, Path(folder), before)
    return code


def _train(recipe: str, overrides: list[str]) -> int:
    try:
        from rlkd.cli import app

        app(["train", recipe, *overrides], prog_name="rlkd")
    except _TooEarly:
        print(f"SIGTERM before the run began: nothing to save (exit {RESUBMIT})", file=sys.stderr)
        return RESUBMIT
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK if end.code is None else INTERNAL
    return OK


def _early(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise _TooEarly(RESUBMIT)


def _say(code: int, folder: Path, before: set[Path]) -> None:
    from rlkd.plan.saving import measured
    from rlkd.submit.ending import line

    new = sorted(_records(folder) - before)
    found = measured(new[-1].parents[2] if new else folder)
    print(line(code, _read(new[-1]) if new else None, found.save_s, found.step_s), flush=True)


def _records(folder: Path) -> set[Path]:
    return {path for pattern in _RECORDS for path in folder.glob(pattern)}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
