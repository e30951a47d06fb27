"""The rewards by name, and how they travel to the processes that run them: as names and options, never as code."""

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rlkd.core.errors import ConfigError, nearest
from rlkd.rewards.own import load_own, target_of

if TYPE_CHECKING:  # the ports import torch, which a verifier's process can do without
    from rlkd.core.ports import Reward

REWARDS: dict[str, str] = {
    "math": "rlkd.rewards.math:Math",
    "exact": "rlkd.rewards.exact:Exact",
    "regex": "rlkd.rewards.regex:Regex",
    "choice": "rlkd.rewards.choice:Choice",
    "format": "rlkd.rewards.format:Format",
    "length": "rlkd.rewards.length:Length",
    "overlong": "rlkd.rewards.length:Overlong",
    "repetition": "rlkd.rewards.repetition:Repetition",
    "reasoning_gym": "rlkd.rewards.reasoning_gym:ReasoningGym",
    "arithmetic": "rlkd.rewards.arithmetic:Arithmetic",
    "code": "rlkd.rewards.code:Code",
}


def find(name: str) -> type[Any]:
    """The dataclass of a reward: a name of the table, `package.module:name` or `path/to/file.py:name`.

    Its fields are the reward's options; a plain function gets a dataclass of its own. ConfigError if there is none, if
    it cannot be imported, or if it is no reward.
    """
    if name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
        found: type[Any] = getattr(importlib.import_module(module), attribute)
        return found
    if ":" in name:
        return load_own(name)
    close = nearest(name, list(REWARDS))
    raise ConfigError(
        "RLKD-C301",
        f"there is no reward named {name!r}" + (f"; did you mean {close!r}?" if close else ""),
        fix=f"one of {', '.join(REWARDS)}, or your own as package.module:name or path/to/file.py:name",
    )


def pack(rewards: Mapping[str, "Reward"]) -> bytes:
    """Rewards as bytes: of each its name, where its class is, and its options. ConfigError for a class that another
    process could not import."""
    rows = []
    for name, reward in rewards.items():
        options = {f.name: getattr(reward, f.name) for f in fields(reward) if f.init}  # type: ignore[arg-type]
        rows.append((name, target_of(type(reward)), pickle.dumps(options)))  # apart: its class is imported first
    return pickle.dumps(rows)


def unpack(packed: bytes) -> dict[str, "Reward"]:
    """The rewards again, made ready (`prepare`, where a reward has one: imports what is slow to import)."""
    rewards = {name: find(target)(**pickle.loads(options)) for name, target, options in pickle.loads(packed)}
    for reward in rewards.values():
        if hasattr(reward, "prepare"):
            reward.prepare()
    return rewards
