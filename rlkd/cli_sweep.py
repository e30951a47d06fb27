"""`rlkd sweep`: a recipe with many settings, from the command line."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlkd.report import secrets
from rlkd.terminal import guarded

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, for example configs/grpo-tiny.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of all trials, for example evaluate.every=10.")
]


@guarded
def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    space: Annotated[
        str, typer.Option("--space", metavar="FILE", help="What to search over: keys with a distribution each.")
    ] = "",
    name: Annotated[str | None, typer.Option("--name", help="Of the sweep's folder; sweep-FILE if left out.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="How many, instead of the file's.")] = None,
    at_once: Annotated[int | None, typer.Option("--at-once", help="At most so many at the same time.")] = None,
) -> int:
    """Try a recipe with many settings, on Ray Tune.

    Everything is checked before a trial starts. After a kill the same command goes on.
    """
    from rlkd.core.errors import ConfigError

    if not space:
        raise ConfigError("RLKD-C606", "which keys to search over?", where="command line", fix="--space FILE")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    secrets.learn(os.environ, recipe, overrides or ())
    from rlkd.sweep import tuner

    return tuner.sweep(recipe, overrides or [], Path(space), name, trials, at_once)
