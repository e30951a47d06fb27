"""`rlkd render`: files for the platforms that run a recipe."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlkd.report import secrets
from rlkd.terminal import Json, guarded, show_result

if TYPE_CHECKING:
    from rlkd.render.settings import Settings

Many = list[str] | None


@guarded
def render(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As in `rlkd train`.")],
    overrides: Annotated[Many, typer.Argument(metavar="KEY=VALUE", help="Settings on top.")] = None,
    platform: Annotated[str, typer.Option("--for", help="kuberay, slurm, docker or ray-up.")] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; rendered/NAME/PLATFORM if left out.")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus-per-node", min=0, help="8 if the recipe wants GPUs.")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus-per-node", min=1, help="8 a GPU; 4 without.")] = None,
    memory: Annotated[
        int | None,
        typer.Option("--memory-gib", min=1, help="At least 64 a GPU, 16 without."),
    ] = None,
    shared: Annotated[
        str | None, typer.Option("--shared", metavar="DIR", help="A folder all nodes see; the run starts in it.")
    ] = None,
    claim: Annotated[str | None, typer.Option("--claim", help="kuberay: the volume claim of --shared.")] = None,
    secret: Annotated[str | None, typer.Option("--secret", help="kuberay: a secret with the environment.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="rlkd:cpu or rlkd:gpu if left out.")] = None,
    stable: Annotated[
        Many, typer.Option("--stable", metavar="KEY=VALUE", help="kuberay: label of nodes that stay.")
    ] = None,
    preemptible: Annotated[
        Many, typer.Option("--preemptible", metavar="KEY=VALUE", help="kuberay: label of nodes that may go.")
    ] = None,
    toleration: Annotated[
        Many, typer.Option("--toleration", metavar="KEY=VALUE:EFFECT", help="kuberay: taint of nodes that may go.")
    ] = None,
    notice: Annotated[int | None, typer.Option("--notice", help="kuberay: seconds such a node gets; 30.")] = None,
    retries: Annotated[
        int | None, typer.Option("--retries", help="How often an interrupted run goes on by itself; 20.")
    ] = None,
    time: Annotated[str | None, typer.Option("--time", help="slurm: of one job; 24:00:00.")] = None,
    sbatch: Annotated[Many, typer.Option("--sbatch", metavar="OPTION", help="slurm: --sbatch=--partition=gpu.")] = None,
    grace: Annotated[
        int | None, typer.Option("--grace", min=10, help="Seconds from SIGTERM to the kill; planned if left out.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write the files that run a recipe on a platform.

    Nodes, GPUs and grace periods come from the recipe. Nothing is started.
    """
    from rlkd.render.settings import platform as known

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    secrets.learn(os.environ, recipe, overrides or ())
    platform = known(platform)
    from rlkd import rendered
    from rlkd.config.stages import load

    stages = load(recipe, overrides or ())
    nodes = rendered.Nodes(gpus, cpus, memory)
    told: dict[str, Any] = {
        "image": image, "shared": shared, "claim": claim, "secret": secret, "stable": stable,
        "preemptible": preemptible, "toleration": toleration, "notice": notice, "retries": retries,
        "time": time, "sbatch": sbatch,
    }  # fmt: skip
    said = _said({"gpus-per-node": gpus, "cpus-per-node": cpus, "memory-gib": memory, **told, "grace": grace})
    settings = _settings(told, rendered.machine([s.config for s in stages], nodes).gpus > 0)
    folder = out or Path("rendered") / stages[0].config.name / platform
    return show_result(
        rendered.render(stages, recipe, overrides or (), platform, folder, nodes, settings, grace, said), as_json
    )


def _settings(told: Mapping[str, Any], gpu: bool) -> "Settings":
    """What was not told has its default there."""
    from rlkd.render.settings import Settings, labels, tolerations

    given = {name: value for name, value in told.items() if value is not None}
    read: Mapping[str, Callable[[Any], Any]] = {
        "stable": lambda texts: labels("--stable", texts),
        "preemptible": lambda texts: labels("--preemptible", texts),
        "toleration": tolerations,
        "sbatch": tuple,
    }
    names = {"toleration": "tolerations", "notice": "notice_s"}
    found = {names.get(name, name): read.get(name, _same)(value) for name, value in given.items()}
    return Settings(**{"image": f"rlkd:{'gpu' if gpu else 'cpu'}", **found})


def _same(value: Any) -> Any:
    return value


def _said(options: Mapping[str, Any]) -> list[str]:
    """The options that were given, as on the command line, for the first lines of the files."""
    given = ((name, one) for name, value in options.items() for one in (value if isinstance(value, list) else [value]))
    return [f"--{name}={one}" for name, one in given if one is not None]
