"""Where commands end: their results, their errors, and the exit codes (core/errors.py).

Stdout is data, stderr is talk; no secret is in either.
"""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rlkd.core.errors import INTERNAL, INTERRUPTED, OK, PREFLIGHT, USAGE, PreflightError, RlkdError, Stopped
from rlkd.report import secrets

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """The one place where errors end: told to the user, and made the exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            code = command(*args, **options)
        except RlkdError as e:
            if options.get("as_json"):
                problems = [{k: v and secrets.without(v) for k, v in asdict(p).items()} for p in e.problems]
                print(json.dumps({"exit": e.exit_code, "problems": problems}))
            show_error(e)
            show_notes(e)
            code = e.exit_code
        except Stopped as e:
            print(secrets.without(e.message), f"(exit {e.exit_code})", file=sys.stderr)
            show_notes(e)
            code = e.exit_code
        except BrokenPipeError:  # the reader of a pipe went away: nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = INTERNAL
        except KeyboardInterrupt:
            print(f"interrupted: the last checkpoint stands (exit {INTERRUPTED})", file=sys.stderr)
            code = INTERRUPTED
        except Exception as e:
            if isinstance(e, OSError) and e.filename is not None:  # a disk, a right: not ours to mend
                what = f"{e.strerror or type(e).__name__}: {e.filename}"
                show_error(PreflightError("RLKD-E172", what, fix="see the folder's rights, and that its disk has room"))
                raise typer.Exit(PREFLIGHT) from e
            print(secrets.without(traceback.format_exc()), end="", file=sys.stderr)
            print(f"This is a bug in rlkd: please report it with the lines above (exit {INTERNAL}).", file=sys.stderr)
            code = INTERNAL
        raise typer.Exit(code)

    return run


def show_result(result: Mapping[str, Any], as_json: bool) -> int:
    """A result for people (its `text`) or for programs (everything else)."""
    shown = json.dumps({k: v for k, v in result.items() if k != "text"}) if as_json else result["text"]
    print(secrets.without(shown))
    return int(result.get("exit", OK))


def show_error(error: RlkdError) -> None:
    """Every problem, then how many and the exit code; in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for problem in error.problems:
        first, *rest = secrets.without(str(problem)).split("\n")
        label, colon, what = first.partition(":")
        text = Text.assemble((label, "bold red"), (colon + what, "bold"))
        for line in rest:
            text.append("\n")
            text.append(line, "cyan" if line.startswith(("  -->", "  =")) or "^" in line else "")
        console.print(text, soft_wrap=True)
    count = "1 error" if len(error.problems) == 1 else f"{len(error.problems)} errors"
    outcome = "nothing was started" if error.exit_code in (USAGE, PREFLIGHT) else "stopped"
    console.print(Text(f"{count}, {outcome} (exit {error.exit_code})."), soft_wrap=True)


def show_notes(error: BaseException) -> None:
    """What the attempt that ended with this error says of itself: what is kept, and the command that goes on."""
    for note in getattr(error, "__notes__", ()):
        print(secrets.without(note), file=sys.stderr)
