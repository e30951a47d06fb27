"""The algorithms by name. An algorithm is a frozen dataclass that is its own configuration (core.ports.Algorithm)."""

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rlkd.core.errors import ConfigError, nearest

TABLE: Mapping[str, str] = {
    "grpo": "rlkd.algorithms.grpo:GRPO",
    "dr_grpo": "rlkd.algorithms.dr_grpo:DrGRPO",
    "dapo": "rlkd.algorithms.dapo:DAPO",
    "rloo": "rlkd.algorithms.rloo:RLOO",
    "reinforce_pp": "rlkd.algorithms.reinforce_pp:ReinforcePP",
    "gspo": "rlkd.algorithms.gspo:GSPO",
    "cispo": "rlkd.algorithms.cispo:CISPO",
    "luffy": "rlkd.algorithms.luffy:LUFFY",
    "ampo": "rlkd.algorithms.ampo:AMPO",
    "kdrl": "rlkd.algorithms.kdrl:KDRL",
    "opd": "rlkd.algorithms.opd:OPD",
    "gkd": "rlkd.algorithms.gkd:GKD",
    "thinktuning": "rlkd.algorithms.thinktuning:ThinkTuning",
    "sft": "rlkd.algorithms.sft:SFT",
    "rsft": "rlkd.algorithms.rsft:RSFT",
    "dpo": "rlkd.algorithms.dpo:DPO",
}

_MEMBERS = ("rollout", "guidance", "needs", "whole_groups", "top_k", "knobs", "wants", "credit", "credit_step", "loss")


def algorithm(name: str) -> type[Any]:
    """The dataclass of an algorithm: a name of the table, or a class of your own as `package.module:Class`.

    ConfigError if there is none, if it cannot be imported, or if it is no algorithm.
    """
    if name in TABLE:
        module, _, attribute = TABLE[name].partition(":")
        found: type[Any] = getattr(importlib.import_module(module), attribute)
        return found
    if ":" in name:
        return _own(name)
    close = nearest(name, list(TABLE))
    raise ConfigError(
        "RLKD-C010",
        f"there is no algorithm named `{name}`",
        fix=(f"did you mean `{close}`?  " if close else "")
        + f"(one of: {', '.join(TABLE)}; or your own as package.module:Class)",
    )


def _own(name: str) -> type[Any]:
    """A user's class. Errors of the user's module are told by their type and message."""
    path, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(path)
    except (Exception, SystemExit) as e:
        raise ConfigError(
            "RLKD-C010",
            f"the algorithm `{name}` cannot be imported: {type(e).__name__}: {e}",
            fix="write package.module:Class; the module must be in the current folder, on PYTHONPATH or installed",
        ) from e
    found = getattr(module, attribute, None)
    if found is None:
        close = nearest(attribute, [n for n in dir(module) if not n.startswith("_")])
        hint = f"did you mean `{path}:{close}`?" if close else f"is the class at the top level of {path}?"
        raise ConfigError("RLKD-C010", f"{path} has nothing named `{attribute}`", fix=hint)
    if not isinstance(found, type) or not is_dataclass(found):
        fix = "put @dataclass(frozen=True) over the class, and see rlkd/algorithms/grpo.py for an example"
        raise ConfigError("RLKD-C010", f"`{name}` is no dataclass", fix=fix)
    has = {f.name for f in fields(found)} | set(dir(found))
    lacks = [member for member in ("name", *_MEMBERS) if member not in has]
    if lacks:
        what = f"`{name}` is no algorithm: it lacks {', '.join(lacks)}"
        fix = "extend rlkd.algorithms.grpo.GRPO, or see core.ports.Algorithm for what each of them is"
        raise ConfigError("RLKD-C010", what, fix=fix)
    return found
