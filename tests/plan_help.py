"""Recipes and shapes for the tests of rlkd.plan."""

from functools import cache
from pathlib import Path
from typing import Any

from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.plan.devices import changed
from rlkd.plan.hardware import GPUS, Hardware, cpu
from rlkd.plan.known import KNOWN
from rlkd.plan.plan import Models, Plan, planned
from rlkd.plan.seconds import Learned
from rlkd.plan.shape import Shape, read
from rlkd.plan.work import Lengths, assumed, scorers, writers

CONFIGS = Path(__file__).parent.parent / "configs"
MACHINE = cpu(24 * 2.0**30, 2)


def recipe(name: str = "grpo-tiny", **changes: Any) -> Config:
    """A recipe of configs/, with `learner__ranks=2` for learner.ranks=2."""
    return changed(_loaded(name), {key.replace("__", "."): value for key, value in changes.items()})


@cache
def _loaded(name: str) -> Config:
    return load(CONFIGS / f"{name}.yaml")


def shape(name: str = "Qwen2.5-7B") -> Shape:
    return read(KNOWN[name], name, "here")


def plan(
    config: Config, model: str = "Qwen2.5-7B", hardware: Hardware = GPUS["H100"], lengths: Lengths | None = None,
    learned: Learned | None = None,
) -> Plan:  # fmt: skip
    """Frozen models are of the policy's shape."""
    policy = shape(model)
    models = Models(policy, dict.fromkeys({**scorers(config), **writers(config)}, policy))
    return planned(config, models, hardware, lengths or assumed(config, policy), learned)
