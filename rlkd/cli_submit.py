"""`rlkd submit|status|logs|stop`: runs as jobs of a Ray cluster."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlkd.report.secrets import without
from rlkd.terminal import Json, guarded, show_result

if TYPE_CHECKING:
    from rlkd.submit.jobs import Jobs

MB = 10**6
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="URL", help="The cluster's dashboard, http://HEAD:8265. Or RAY_ADDRESS.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A run's name; or NAME-2 for one attempt.")]


@guarded
def submit(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top, for example learner.lr=1e-6.")
    ] = None,
    ray: Ray = None,
    name: Annotated[str | None, typer.Option("--name", help="The run's name: its jobs are NAME-1, NAME-2, …")] = None,
    retries: Annotated[int, typer.Option("--retries", min=0, help="How often it is submitted again on exit 75.")] = 20,
    pause: Annotated[float, typer.Option("--pause", min=0, help="Seconds before that, at least.")] = 10.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not follow the job; nobody then submits it again.")
    ] = False,
    grace: Annotated[
        int | None, typer.Option("--grace", min=1, help="Seconds from a stop to the kill; reckoned if left out.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="More files for the package: a path or a pattern.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME[=VALUE]", help="A variable for the job.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="The Python that has Ray, on the nodes.")] = "python",
    limit_mb: Annotated[
        int | None, typer.Option("--limit-mb", min=1, help="How large the package, and a file in it, may be.")
    ] = None,
) -> int:
    """Train on a Ray cluster: the run as a job there, followed here.

    It is submitted again when its machines were taken away (exit 75). Ctrl-C lets go of it, and it goes on.
    """
    from rlkd.cli import _stages
    from rlkd.submit.client import Options, Submission, environment
    from rlkd.submit.jobs import connect
    from rlkd.submit.package import FILE_LIMIT, LIMIT, packed

    given = [*(overrides or ()), *([] if name is None else [f"name={name}"])]
    stages = _stages(recipe, given)
    options = Options(retries, pause, detach=detach, grace_s=grace, env=environment(env or ()), python=python)
    limits = (FILE_LIMIT, LIMIT) if limit_mb is None else (limit_mb * MB, limit_mb * MB)
    package = packed(stages, Path(recipe), given, include or (), *limits)
    return Submission(connect(ray), stages, package, options, _out, _say).run()


@guarded
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A run; all if left out.")] = None,
    ray: Ray = None,
    as_json: Json = False,
) -> int:
    """How the runs on a Ray cluster are, and how their attempts ended."""
    from rlkd.submit import control

    with _answering(ray) as jobs:
        return show_result(control.status(jobs, name), as_json)


@guarded
def logs(
    name: Name,
    ray: Ray = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> int:
    """What a run on a Ray cluster prints."""
    from rlkd.submit import control

    with _answering(ray) as jobs:
        return control.logs(jobs, name, follow, _out, _say)


@guarded
def stop(
    name: Name,
    ray: Ray = None,
    for_good: Annotated[
        bool, typer.Option("--for-good", help="And whoever follows it shall not submit it again.")
    ] = False,
) -> int:
    """Ask a run on a Ray cluster to save and end, and watch it do that.

    A `rlkd submit` that follows it submits it again, as after any interruption; not with --for-good.
    """
    from rlkd.submit.control import Stopping

    with _answering(ray) as jobs:
        return Stopping(jobs, name, for_good, _out, _say).run()


@contextmanager
def _answering(ray: str | None) -> Iterator["Jobs"]:
    """The jobs of the cluster; what it does not answer within the context is an error for people."""
    from rlkd.submit.client import unanswered
    from rlkd.submit.jobs import NoSuchJob, Unanswered, connect

    jobs = connect(ray)
    try:
        yield jobs
    except (Unanswered, NoSuchJob) as error:
        raise unanswered(jobs, error) from error


def _out(line: str) -> None:
    print(without(line), flush=True)


def _say(line: str) -> None:
    print(without(line), file=sys.stderr, flush=True)


def hook(app: typer.Typer) -> None:
    """These commands into the command line."""
    for command in (submit, status, logs, stop):
        app.command()(command)
