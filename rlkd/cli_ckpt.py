"""`rlkd ckpt`: a run's checkpoints from the command line."""

from typing import Annotated

import typer

from rlkd.terminal import Json, Run, guarded, show_result

ckpt = typer.Typer(help="A run's checkpoints: look at them, verify, keep, delete.", no_args_is_help=True)

Step = Annotated[int, typer.Argument(metavar="STEP", help="The step of a checkpoint.")]


@ckpt.command("ls")
@guarded
def ckpt_ls(run_directory: Run, as_json: Json = False) -> int:
    """The checkpoints, and why each is kept."""
    import rlkd.ckpt as checkpoints

    return show_result(checkpoints.ls(run_directory), as_json)


@ckpt.command("verify")
@guarded
def ckpt_verify(
    run_directory: Run,
    step: Annotated[int | None, typer.Argument(metavar="STEP", help="Only this one; all if left out.")] = None,
    as_json: Json = False,
) -> int:
    """Read every file, and compare it with what was written.

    Exit code 7 if one is damaged.
    """
    import rlkd.ckpt as checkpoints

    return show_result(checkpoints.verify(run_directory, step), as_json)


@ckpt.command("pin")
@guarded
def ckpt_pin(run_directory: Run, step: Step, as_json: Json = False) -> int:
    """Never delete this one."""
    import rlkd.ckpt as checkpoints

    return show_result(checkpoints.pin(run_directory, step), as_json)


@ckpt.command("unpin")
@guarded
def ckpt_unpin(run_directory: Run, step: Step, as_json: Json = False) -> int:
    """Delete it when others are newer, as any."""
    import rlkd.ckpt as checkpoints

    return show_result(checkpoints.unpin(run_directory, step), as_json)


@ckpt.command("prune")
@guarded
def ckpt_prune(
    run_directory: Run,
    last: Annotated[int | None, typer.Option("--last", help="Keep so many of the newest.")] = None,
    every: Annotated[int | None, typer.Option("--every", help="Keep every so many steps.")] = None,
    best: Annotated[int | None, typer.Option("--best", help="Keep so many of the best.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only say what would be deleted.")] = False,
    as_json: Json = False,
) -> int:
    """Delete what is not kept.

    By the recipe of the run, or by the numbers given here.
    """
    import rlkd.ckpt as checkpoints

    return show_result(checkpoints.prune(run_directory, last, every, best, dry), as_json)
