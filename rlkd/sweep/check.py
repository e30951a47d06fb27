"""A space against its recipe, before any trial starts: every value that may come out is loaded with it.

Each extreme of each key alone, then a choice of corners of all keys together, so that what is out of range, of another
type, misspelt or contradicts another key is told at the key's place in the space file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkd.config.contradictions import NAME
from rlkd.config.places import Found, Place, did_you_mean, similar
from rlkd.config.stages import Stage, load
from rlkd.core.errors import ConfigError, Problem
from rlkd.sweep import space as spaces
from rlkd.sweep.settings import Settings
from rlkd.sweep.space import Space
from rlkd.sweep.spec import LISTS, WHOLE, combinations, overrides

TOGETHER = 12  # corners of all keys at once
IDENTITY = ("model", "data", "seed", "algorithm.name", "curriculum.name")  # checkpoints of another run: no copy by PBT
METRICS = ("prompts", "answers", "unjudged", "reward", "length", "truncated")


def checked(
    recipe: str, given: Sequence[str], path: str, trials: int | None = None, at_once: int | None = None
) -> Space:
    """The space of the file. ConfigError with every problem of recipe, overrides `given`, space, and all together.

    `trials` and `at_once` are of the command line, and stand in for the file's."""
    found = Found()
    space = spaces.read(path, found)
    told: dict[str, Any] = {name: n for name, n in (("trials", trials), ("at_once", at_once)) if n is not None}
    space = replace(space, settings=replace(space.settings, **told))
    for name, number in told.items():
        if number < 1:
            found.add("RLKD-C603", f"--{name.replace('_', '-')} {number}: must be at least 1", Place("command line"))
    try:
        stages = load(recipe, given)
    except ConfigError as error:
        for problem in error.problems:
            found.put(problem, Place(problem.where or recipe, (1, 0, 0), problem.excerpt))
        found.stop_if_any()
    _values(space, recipe, given, found)
    for key, what, fix in _rules(space, stages):
        found.add("RLKD-C604", what, space.place(key), fix)
    found.stop_if_any()
    return space


def _values(space: Space, recipe: str, given: Sequence[str], found: Found) -> None:
    """Each value of each key alone; then, of the keys that are right alone, some together."""
    right = {}
    for key, spec in space.specs.items():
        problems: list[Problem] = []
        for value in spec.corners():
            problems += _problems(recipe, [*given, *overrides({key: value})])
            codes = {p.code for p in problems}
            if "RLKD-C002" in codes or ("RLKD-C003" in codes and spec.kind not in LISTS):
                break  # no such key, whatever its value; no such type, whatever the number
        if not problems:
            right[key] = spec
        for problem in problems:
            if problem.code == "RLKD-C003" and spec.kind not in (*WHOLE, *LISTS):
                problem = replace(problem, fix=f"for whole numbers: {', '.join(WHOLE)}, choice or grid")
            found.put(problem, space.place(key))
    for corner in combinations(right, TOGETHER) if len(right) > 1 else ():
        together = " ".join(overrides(corner))
        for problem in _problems(recipe, [*given, *overrides(corner)]):
            key = next((k for k in corner if problem.where and problem.where.startswith(f"command line: {k}=")), "")
            found.put(replace(problem, what=f"{problem.what} (with {together})"), space.place(key))


def _problems(recipe: str, given: Sequence[str]) -> Sequence[Problem]:
    try:
        load(recipe, given)
    except ConfigError as error:
        return error.problems
    return ()


def _rules(space: Space, stages: Sequence[Stage]) -> Iterator[tuple[str, str, str]]:
    """What in the sweep's settings does not go with the recipe or the space: the key, what is wrong, what to do."""
    yield from _measured(space.settings, stages)
    yield from _searched(space)
    if space.settings.scheduler == "pbt":
        yield from _copied(space, stages)


def _measured(settings: Settings, stages: Sequence[Stage]) -> Iterator[tuple[str, str, str]]:
    config = stages[-1].config
    known = [f"eval/pass@{k}" for k in config.evaluate.k] + [f"eval/{name}" for name in METRICS]
    if settings.metric not in known:
        fix = did_you_mean(similar(settings.metric, known)) or f"one of {', '.join(known)}"
        yield "sweep.metric", f"sweep.metric={settings.metric}: the recipe reports no such number", fix
    if config.data.holdout is None:
        what = "the recipe has no data.holdout: there is nothing to compare trials by"
        yield "sweep.metric", what, "give data.holdout"
    elif settings.scheduler != "none" and not config.evaluate.every:
        what = f"sweep.scheduler={settings.scheduler} compares trials while they train, and evaluate.every is 0"
        yield "sweep.scheduler", what, f"for example evaluate.every={max(1, config.schedule.steps // 10)}"
    elif not config.evaluate.every and not config.evaluate.at_end:
        yield "sweep.metric", "the recipe evaluates nothing after the start", "evaluate.at_end=true or evaluate.every"


def _searched(space: Space) -> Iterator[tuple[str, str, str]]:
    search = space.settings.search
    for key, spec in space.specs.items():
        if search == "grid" and spec.kind not in LISTS:
            yield key, f"`{key}`: {spec.kind} is no list, and sweep.search=grid tries all of a list", "grid: [a, b, …]"
        elif search != "grid" and spec.kind == "grid":
            yield key, f"`{key}`: grid, but sweep.search={search}", "sweep.search: grid, or `choice` here"
        elif search == "optuna" and (spec.kind in ("normal", "qloguniform") or "/" in key):
            why = f"`{key}`: " + ("its name has a /" if "/" in key else spec.kind)
            yield key, f"{why}, which Optuna does not take", "sweep.search: random, or another distribution"


def _copied(space: Space, stages: Sequence[Stage]) -> Iterator[tuple[str, str, str]]:
    if space.settings.search != "random":
        yield "sweep.search", f"sweep.search={space.settings.search}: pbt draws for itself", "sweep.search: random"
    if len(stages) > 1:
        yield "sweep.scheduler", "pbt, but the recipe has stages: their checkpoints do not fit each other", "asha"
    if space.trials < 2:
        yield "sweep.trials", f"pbt with {space.trials} trial: there is nobody to copy", "at least 2"
    for key, spec in space.specs.items():
        if any(key == own or key.startswith(f"{own}.") for own in IDENTITY):
            what = f"`{key}` cannot be searched by pbt: a checkpoint does not fit a run that differs in it"
            yield key, what, "random search for this one"
        elif spec.kind == "normal":
            yield key, f"`{key}`: pbt takes no normal distribution", "uniform or loguniform"


def folder_name(space: str, name: str | None) -> str:
    """Of the sweep's folder. ConfigError for a name that can be none."""
    chosen = f"sweep-{Path(space).stem}" if name is None else name
    if not NAME.fullmatch(chosen):
        raise ConfigError("RLKD-C608", f"a sweep cannot be called {chosen!r}", "command line", "letters, digits, . _ -")
    return chosen
