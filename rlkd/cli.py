"""The command line. Each command loads the recipe, calls one function, and returns its exit code (terminal.py).

Nothing heavy is imported before a command needs it.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlkd.cli_ckpt import ckpt
from rlkd.cli_plan import plan
from rlkd.cli_render import render
from rlkd.cli_submit import hook as hook_submit
from rlkd.cli_sweep import sweep
from rlkd.core.errors import OK, ConfigError
from rlkd.report import secrets
from rlkd.terminal import Json, Run, guarded, show_result

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
app.add_typer(ckpt, name="ckpt")
app.command()(plan)
hook_submit(app)
app.command()(render)
app.command()(sweep)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, for example configs/grpo-tiny.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top, for example learner.lr=1e-6.")
]

Step = Annotated[int | None, typer.Option("--step", help="Of this step's checkpoint; the newest if left out.")]


def main() -> None:
    """The console script `rlkd`."""
    app(prog_name="rlkd")


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
    resume: Annotated[
        str,
        typer.Option("--resume", metavar="auto|never|STEP", help="From the newest checkpoint; a new run; from STEP."),
    ] = "auto",
    accept_new_data: Annotated[
        bool, typer.Option("--accept-new-data", help="Go on though the training data changed: a new epoch begins.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits every time, interrupted or not (float32 on CPU).")
    ] = False,
) -> int:
    """Train, or go on with an interrupted run: the same command, the first and every time."""
    if resume not in ("auto", "never") and not resume.isdecimal():
        raise ConfigError("RLKD-C413", f"--resume {resume}", where="command line", fix="auto, never, or a step")
    more = [] if name is None else [f"name={name}"]
    stages = _stages(recipe, [*(overrides or ()), *more, *(["deterministic=true"] if deterministic else [])])
    import rlkd.staged as staged

    return staged.train(stages, Path(recipe), resume, accept_new_data)


@app.command()
@guarded
def check(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> int:
    """Check a recipe and all it names; nothing is trained.

    Says in words what would run, and scores a few real samples.
    """
    stages = _stages(recipe, overrides or ())
    import rlkd.staged as staged

    return show_result(staged.check(stages), as_json)


@app.command()
@guarded
def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="As in an error, RLKD-C002; all if left out.")
    ] = None,
    as_json: Json = False,
) -> int:
    """What an error code means, and what to do."""
    import rlkd.explain as codes

    return show_result(codes.explain(code), as_json)


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
    as_json: Json = False,
) -> int:
    """Put a model's folder into DIR."""
    import rlkd.models.get as get

    folder = str(get.get(name, directory))
    return show_result({"model": name, "directory": folder, "text": f"{name} is in {folder}"}, as_json)


@app.command("eval")
@guarded
def evaluate(
    what: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or a model's.")],
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; that of the run, if left out.")
    ] = None,
    overrides: Overrides = None,
    step: Step = None,
    as_json: Json = False,
) -> int:
    """Evaluate on the recipe's held-out prompts.

    Greedy or pass@k (`evaluate.*` of the recipe), with confidence intervals.
    """
    import rlkd.run as run
    import rlkd.staged as staged
    from rlkd.prove import config_of

    folder, settings = staged.run_folder(what), list(overrides or ())
    is_run = (folder / "run.json").exists()
    if step is not None and not is_run:
        fix = "leave --step out, or give the folder of a run"
        raise ConfigError("RLKD-C418", f"--step {step}, but this is a model's folder, not a run's", str(what), fix)
    if recipe is not None and "=" in recipe and not Path(recipe).exists():  # no recipe, but the first setting
        settings.insert(0, recipe)
        recipe = None
    if recipe is None and not is_run:
        what_for = f"which prompts to evaluate {what} on?"
        raise ConfigError("RLKD-C416", what_for, where="command line", fix="rlkd eval MODEL RECIPE")
    stages = _stages(recipe or str(config_of(folder)), settings)
    return show_result(run.evaluate(stages[-1].config, folder, step), as_json)


@app.command()
@guarded
def fork(
    run_directory: Run,
    name: Annotated[str, typer.Argument(metavar="NEWNAME", help="Of the new run, in a folder beside the other's.")],
    step: Step = None,
    as_json: Json = False,
) -> int:
    """Begin a new run with a checkpoint of another.

    Weights, optimizer, ledger and place in the data are the other's; of the other nothing is changed.
    """
    import rlkd.fork as forks

    return show_result(forks.fork(run_directory, name, step, lambda text: print(text, file=sys.stderr)), as_json)


@app.command()
@guarded
def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the model.")],
    step: Step = None,
    as_json: Json = False,
) -> int:
    """Write a run's model as a Hugging Face folder.

    The folder is loaded again and compared with the checkpoint.
    """
    import rlkd.run as run
    import rlkd.staged as staged

    return show_result(run.export(staged.run_folder(run_directory), step, directory), as_json)


@app.command("why-stuck")
@guarded
def why_stuck(run_directory: Run, as_json: Json = False) -> int:
    """Why a run does not get on, or how it ended.

    From another terminal: takes the stacks of its processes.
    """
    import rlkd.staged as staged
    from rlkd import why_stuck as stuck

    return show_result(stuck.why_stuck(staged.begun_folder(run_directory)), as_json)


@app.command()
@guarded
def resume(
    run_directory: Run,
    overrides: Overrides = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Train a few steps twice in copies, and say how exact a resume is.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="How many steps, with --prove.")] = 2,
    as_json: Json = False,
) -> int:
    """Go on with a run from what its folder holds.

    With --prove nothing of the run is changed.
    """
    import rlkd.prove as prove_

    folder = run_directory.resolve()
    if prove:
        return show_result(prove_.prove(folder, steps, lambda text: print(text, file=sys.stderr)), as_json)
    config = prove_.config_of(folder)
    stages = _stages(str(config), [f"name={folder.name}", f"report.directory={folder.parent}", *(overrides or ())])
    import rlkd.staged as staged

    return staged.train(stages, config)


@app.command()
@guarded
def chaos(
    recipe: Recipe,
    overrides: Overrides = None,
    faults: Annotated[str, typer.Option("--faults", help="Names or numbers, with commas; all if left out.")] = "",
    kills: Annotated[int, typer.Option("--kills", help="How many faults.")] = 5,
    gap: Annotated[float, typer.Option("--gap", help="Mean seconds between two of them.")] = 5.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random instants.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the two runs.")] = Path(
        "runs/chaos"
    ),
    as_json: Json = False,
) -> int:
    """Kill things in a run on purpose, and compare it with a quiet one.

    Faults: rollout (F1), stall (F3), reward (F6), teacher (F7), learner (F8), driver (F9), term (F11), flip (F24).
    """
    from rlkd import chaos as killer

    chosen = killer.chosen(faults)
    _stages(recipe, overrides or ())  # a recipe that is wrong is told of before anything is started
    train = killer.rlkd_train(recipe, overrides or (), out)
    return show_result(
        killer.chaos(train, out, chosen, kills, gap, seed, tell=lambda t: print(t, file=sys.stderr)), as_json
    )


def _stages(recipe: str, overrides: "list[str] | tuple[str, ...]") -> "list[Stage]":
    """The recipe's stages; one, if it says nothing of stages. Algorithms and rewards of one's own are looked for in the
    current folder too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    secrets.learn(os.environ, recipe, overrides)
    from rlkd.config.stages import load

    stages = load(recipe, overrides)
    secrets.KNOWN.learn([stage.config for stage in stages])
    return stages
