"""The command line. Each command loads the recipe, calls one function, and returns its exit code (core/errors.py).

Stdout is data, stderr is talk. Nothing heavy is imported before a command needs it.
"""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlkd.core.errors import INTERNAL, INTERRUPTED, OK, PREFLIGHT, USAGE, RlkdError, Stopped

if TYPE_CHECKING:
    from rlkd.config.stages import Stage

app = typer.Typer(
    name="rlkd",
    help="Reinforcement learning with verifiable rewards, and distillation, for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="Small models that come without a model hub.", no_args_is_help=True)
app.add_typer(models, name="model")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, for example configs/grpo-arithmetic.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top, for example learner.lr=1e-6.")
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]


def main() -> None:
    """The console script `rlkd`."""
    app(prog_name="rlkd")


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """The one place where errors end: told to the user, and made the exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            code = command(*args, **options)
        except RlkdError as e:
            if options.get("as_json"):
                print(json.dumps({"exit": e.exit_code, "problems": [asdict(p) for p in e.problems]}))
            _show(e)
            code = e.exit_code
        except Stopped as e:
            print(e.message, f"(exit {e.exit_code})", file=sys.stderr)
            code = e.exit_code
        except BrokenPipeError:  # the reader of a pipe went away: nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = INTERNAL
        except KeyboardInterrupt:
            print(f"interrupted: the last checkpoint stands (exit {INTERRUPTED})", file=sys.stderr)
            code = INTERRUPTED
        except Exception:
            traceback.print_exc()
            print(f"This is a bug in rlkd: please report it with the lines above (exit {INTERNAL}).", file=sys.stderr)
            code = INTERNAL
        raise typer.Exit(code)

    return run


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"rlkd {version_of('rlkd')}")
        raise typer.Exit(OK)


@app.command()
@guarded
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option("--name", help="The run's name, and that of its folder.")] = None,
) -> int:
    """Train, or go on with an interrupted run."""
    stages = _stages(recipe, [*(overrides or ()), *([] if name is None else [f"name={name}"])])
    import rlkd.staged as staged

    return staged.train(stages, Path(recipe))


@app.command()
@guarded
def check(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> int:
    """Check a recipe and all it names; nothing is trained.

    Says in words what would run, and scores a few real samples.
    """
    stages = _stages(recipe, overrides or ())
    import rlkd.staged as staged

    return _print(staged.check(stages), as_json)


@app.command()
@guarded
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Import the heavy packages too; a minute.")] = False,
    as_json: Json = False,
) -> int:
    """Check this machine and its packages.

    Every line that is not right says how to mend it.
    """
    from rlkd import doctor

    return doctor.main(deep, as_json)


@models.command("get")
@guarded
def model_get(
    name: Annotated[str, typer.Argument(help="tiny, tiny-teacher, smollm2 or gemma3-270m.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, for model.path.")],
) -> int:
    """Put a model's folder into DIR."""
    import rlkd.models.get as get

    get.get(name, directory)
    return OK


@app.command("eval")
@guarded
def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or a model's.")],
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Evaluate on the recipe's held-out prompts.

    Greedy or pass@k (`evaluate.*` of the recipe), with confidence intervals.
    """
    stages = _stages(recipe, overrides or ())
    import rlkd.run as run
    import rlkd.staged as staged

    return _print(run.evaluate(stages[-1].config, staged.run_folder(Path(what))), as_json)


@app.command()
@guarded
def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the model.")],
    step: Annotated[
        int | None, typer.Option("--step", help="Of this step's checkpoint; the newest if left out.")
    ] = None,
) -> int:
    """Write a run's model as a Hugging Face folder.

    The folder is loaded again and compared with the checkpoint.
    """
    import rlkd.run as run
    import rlkd.staged as staged

    run.export(staged.run_folder(run_directory), step, directory)
    return OK


def _stages(recipe: str, overrides: "list[str] | tuple[str, ...]") -> "list[Stage]":
    """The recipe's stages; one, if it says nothing of stages. Algorithms and rewards of one's own are looked for in the
    current folder too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from rlkd.config.stages import load

    return load(recipe, overrides)


def _print(result: Mapping[str, Any], as_json: bool) -> int:
    """A result for people (its `text`) or for programs (everything else)."""
    print(json.dumps({k: v for k, v in result.items() if k != "text"}) if as_json else result["text"])
    return OK


def _show(error: RlkdError) -> None:
    """Every problem, then how many and the exit code; in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for problem in error.problems:
        first, *rest = str(problem).split("\n")
        label, colon, what = first.partition(":")
        text = Text.assemble((label, "bold red"), (colon + what, "bold"))
        for line in rest:
            text.append("\n")
            text.append(line, "cyan" if line.startswith(("  -->", "  =")) or "^" in line else "")
        console.print(text, soft_wrap=True)
    count = "1 error" if len(error.problems) == 1 else f"{len(error.problems)} errors"
    outcome = "nothing was started" if error.exit_code in (USAGE, PREFLIGHT) else "stopped"
    console.print(Text(f"{count}, {outcome} (exit {error.exit_code})."), soft_wrap=True)
