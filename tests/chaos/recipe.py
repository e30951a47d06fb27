"""The recipe of the chaos tests: the tiny model, small groups, many short steps."""

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """Written into `folder`; `changes` are sections to update."""
    base: dict[str, Any] = {
        "name": "chaos",
        "model": {"path": str(model)},
        "data": {"train": {"kind": "arithmetic", "size": 500}},
        "algorithm": {"name": "grpo", "rollout": {"samples": 4}},
        "rewards": {f"{HERE}/rewards.py:even": {}},
        "schedule": {"steps": 40, "groups_per_step": 3},
        "sampler": {"engine": "hf", "max_tokens": 8, "workers": 2, "threads": 1},
        "learner": {"lr": 1e-4, "max_tokens": 1024, "threads": 1, "max_restarts": 20},
        "checkpoint": {"every": 2},
        "evaluate": {"at_start": False, "at_end": False},
        "health": {
            "mismatch_stop": 0.0,
            "mismatch_warn": 0.0,
            "canary_every": 0,
        },  # the fast engine makes its log-probs up
        "ray": {"object_store_gib": 0.1},
        "report": {"tensorboard": False, "directory": str(folder)},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path
