"""For the tests of `rlkd sweep`: a recipe without a model, and space files."""

from pathlib import Path
from typing import Any

import yaml

from rlkd.config.places import Found
from rlkd.core.errors import ConfigError, Problem
from rlkd.sweep import space as spaces
from rlkd.sweep.check import checked
from rlkd.sweep.space import Space

EVERY = ["evaluate.every=5"]


def recipe(folder: Path, **changes: Any) -> str:
    """A recipe's file; `changes` are sections to update."""
    base: dict[str, Any] = {
        "name": "small",
        "model": {"path": "models/tiny"},
        "data": {
            "train": {"kind": "arithmetic", "size": 100, "split": "train"},
            "holdout": {"kind": "arithmetic", "size": 20, "split": "holdout"},
        },
        "algorithm": {"name": "grpo", "rollout": {"samples": 4}},
        "rewards": {"arithmetic": {}},
        "schedule": {"steps": 20, "groups_per_step": 4},
        "sampler": {"max_tokens": 48},
        "report": {"directory": str(folder / "runs")},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(base))
    return str(path)


def space_file(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


def read(folder: Path, text: str) -> Space:
    """The space alone. ConfigError with its problems."""
    found = Found()
    space = spaces.read(space_file(folder, text), found)
    found.stop_if_any()
    return space


def problems(folder: Path, text: str, given: list[str] | None = None, **changes: Any) -> list[Problem]:
    """What is wrong with a space for the small recipe."""
    try:
        checked(recipe(folder, **changes), EVERY if given is None else given, space_file(folder, text))
    except ConfigError as error:
        return list(error.problems)
    return []
