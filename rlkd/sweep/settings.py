"""How a sweep goes about it: the section `sweep` of the space file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlkd.config.kinds import WrongType, choices, in_words, settings, value_of, without_none
from rlkd.config.places import Entry, Found, Place, did_you_mean, similar
from rlkd.config.ranges import COUNT, NOT_NEGATIVE, SEED, Range

KEY = "sweep"


@dataclass(frozen=True)
class Settings:
    """Steps are optimizer steps of a trial. What is None is `evaluate.every` of the recipe, or planned."""

    search: Literal["random", "grid", "optuna"] = "random"
    trials: int | None = None  # None: 8, or with search=grid the grid once; a number there: so many times
    scheduler: Literal["none", "asha", "pbt"] = "none"
    metric: str = "eval/pass@1"
    mode: Literal["max", "min"] = "max"
    at_once: int | None = None  # trials; None: as many as the cluster has room for, on CPUs one a machine
    grace: int | None = None  # asha: steps that every trial may make; pbt: steps before the first copy
    reduction: float = 4.0  # asha: one trial in so many goes on to so many times the steps
    perturb: int | None = None  # pbt: steps between two looks at who copies whom
    quantile: float = 0.25  # pbt: this share of the trials, the worst, copies the best
    failures: int = 3  # times that one trial may be lost and go on from its checkpoint
    seed: int = 0  # of what is drawn


RANGES: Mapping[str, Range] = {
    "trials": COUNT,
    "at_once": COUNT,
    "grace": COUNT,
    "reduction": Range(above=1),
    "perturb": COUNT,
    "quantile": Range(above=0, at_most=0.5),
    "failures": NOT_NEGATIVE,
    "seed": SEED,
}


def read(entry: Entry | None, found: Found) -> tuple[Settings, dict[str, Place]]:
    """The section's settings, and where each was written; problems go to `found`."""
    if entry is None:
        return Settings(), {}
    if not isinstance(entry.value, dict):
        found.add("RLKD-C603", f"`{KEY}` must be a section, not {entry.shown()}", entry.place, "sweep: {trials: 8}")
        return Settings(), {}
    hints, given, places = settings(Settings), {}, {}
    for name, one in entry.value.items():
        if name not in hints:
            fix = did_you_mean(similar(name, list(hints))) or f"one of {', '.join(hints)}"
            found.add("RLKD-C603", f"unknown key `{KEY}.{name}`", one.place, fix)
            continue
        try:
            value = _value(one, hints[name])
        except WrongType:
            found.add("RLKD-C603", f"`{KEY}.{name}` must be {in_words(hints[name])}, not {one.shown()}", one.place)
            continue
        if name in RANGES and value is not None and value not in RANGES[name]:
            found.add("RLKD-C603", f"`{KEY}.{name}`={value}: must be {RANGES[name]}", one.place)
        else:
            given[name], places[name] = value, one.place
    return replace(Settings(), **given), places


def _value(entry: Entry, hint: Any) -> Any:
    """The entry's value; WrongType if it is none of this type."""
    inner, optional = without_none(hint)
    value = value_of(entry, hint)
    if value is None and optional:
        return None
    if allowed := choices(inner):
        right = value in allowed
    elif inner is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    else:
        right = isinstance(value, inner) and not isinstance(value, bool)
    if not right:
        raise WrongType
    return value
