"""What a run is, so that its checkpoints are used only by the run they belong to.

Another model, tokenizer, algorithm, order of the data or seed is another run: refused, with a table of what differs.
Other data may be accepted (`--accept-new-data`): a new epoch begins. Everything else may change between attempts and is
told: settings; the number of workers and ranks, and the versions of packages, with what exactness is lost.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from rlkd.config.load import resolved
from rlkd.config.schema import Config
from rlkd.core.errors import CheckpointError
from rlkd.export import checkpoints
from rlkd.inputs import Inputs
from rlkd.model_folder import model_config

PACKAGES = ("rlkd", "torch", "deepspeed", "vllm", "transformers", "ray", "numpy")
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of config.json: not the model itself
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOPOLOGY = ("learner.ranks", "learner.zero_stage", "sampler.workers", "sampler.tensor_parallel", "sampler.engine")
UNTOLD = ("name", "report")  # settings that change nothing of what is trained


@dataclass(frozen=True)
class Change:
    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.key} {self.was} → {self.now}"


@dataclass(frozen=True)
class Comparison:
    """What differs between the attempt before and this one."""

    refused: Sequence[Change] = ()  # another run
    data: Sequence[Change] = ()  # other prompts: refused unless accepted
    told: Sequence[str] = ()  # lines for the user

    @property
    def new_data(self) -> bool:
        return bool(self.data)


def of(config: Config, read: Inputs) -> dict[str, Any]:
    """For run.json."""
    return {
        "model": _digest({k: v for k, v in model_config(config.model.path).items() if k not in VOLATILE}),
        "tokenizer": _tokenizer(config),
        "algorithm": config.algorithm.name,
        "curriculum": config.curriculum.name,
        "seed": config.seed,
        "data": read.data.train.fingerprint,
        "settings": dict(_flat(yaml.safe_load(resolved(config)))),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Versions of what a step's numbers depend on; what is not installed is left out. The CPU build of vllm is vllm."""
    found = {}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cpu") if name == "vllm" else (name,):
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:
                continue
    return found


def compare(was: Mapping[str, Any], now: Mapping[str, Any]) -> Comparison:
    """`was` is of the attempt before. What an older rlkd did not write down is not compared."""
    names = {"model": "model (config.json)", "tokenizer": "tokenizer", "algorithm": "algorithm.name"}
    names |= {"curriculum": "curriculum.name", "seed": "seed"}
    changes = {key: Change(key, str(was[key]), str(now[key])) for key in now if key in was and was[key] != now[key]}
    refused = [Change(name, changes[key].was, changes[key].now) for key, name in names.items() if key in changes]
    data = [Change("data.train", changes["data"].was, changes["data"].now)] if "data" in changes else []
    settings = list(_settings(was["settings"], now["settings"])) if "settings" in was else []
    told = [f"changed: {change}" for change in settings if change.key not in TOPOLOGY]
    told += _topology(settings, bool(now["settings"].get("deterministic")))
    told += [
        line for name, v in now["packages"].items() if (line := _drift(name, was.get("packages", {}).get(name), v))
    ]
    return Comparison(tuple(refused), tuple(data), tuple(told))


def refuse(found: Comparison, directory: Path, accept_new_data: bool) -> None:
    """CheckpointError RLKD-K120 (another run) or RLKD-K121 (other data) with a table of what differs."""
    if found.refused:
        raise CheckpointError(
            "RLKD-K120",
            f"the checkpoints here are of another run:\n{table([*found.refused, *found.data])}",
            where=str(directory),
            fix="take back what was changed, or start a new run: name=…" + _from_the_weights(directory),
        )
    if found.data and not accept_new_data:
        raise CheckpointError(
            "RLKD-K121",
            f"the training data is not what this run began with:\n{table(found.data)}",
            where=str(directory),
            fix="use the old data; or --accept-new-data to go on with a new epoch of these; or a new run: name=…",
        )


def _from_the_weights(directory: Path) -> str:
    """How a new run has at least the weights of this one's newest checkpoint."""
    newest = max(checkpoints(directory), default=None)
    if newest is None:
        return ""
    return f"; with these weights and a fresh optimizer: name=… model.path={checkpoints(directory)[newest] / 'hf'}"


def table(changes: Sequence[Change]) -> str:
    """One line a change: what, was, now."""
    keys, before = max(len(c.key) for c in changes), max(len(c.was) for c in changes)
    return "\n".join(f"     {c.key:<{keys}}   {c.was:<{before}} → {c.now}" for c in changes)


def _settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for key in [*now, *(k for k in was if k not in now)]:
        if key.split(".")[0] in UNTOLD or key in ("algorithm.name", "curriculum.name", "seed"):
            continue
        if key not in was or key not in now or was[key] != now[key]:
            yield Change(key, str(was.get(key, "not set")), str(now.get(key, "not set")))


def _topology(changes: Sequence[Change], deterministic: bool) -> list[str]:
    moved = [str(c) for c in changes if c.key in TOPOLOGY]
    if not moved:
        return []
    level = "this resume is L2 (the same prompts and seeds)"
    return [f"{level}, not L4 (the same numbers), because {', '.join(moved)}" if deterministic
            else f"{level}: {', '.join(moved)}"]  # fmt: skip


def _drift(name: str, was: str | None, now: str) -> str | None:
    """What another version of a package means: a patch is told, more is a warning. Never a reason to refuse."""
    if was is None or was == now:
        return None
    try:
        old, new = Version(was), Version(now)
        patch = (old.major, old.minor) == (new.major, new.minor)
    except InvalidVersion:
        patch = False
    if patch:
        return f"{name} {was} → {now}"
    return f"warning: {name} {was} → {now}: the same numbers (L3, L4) cannot be expected, the same prompts (L2) can"


def _tokenizer(config: Config) -> str:
    """Of the files a tokenizer is made of, and of a chat template that replaces the folder's."""
    folder, found = Path(config.model.path).expanduser(), hashlib.blake2b(digest_size=8)
    files = [folder / name for name in TOKENIZER]
    if config.model.chat_template is not None:
        files.append(Path(config.model.chat_template))
    for number, file in enumerate(files):
        if file.is_file():
            found.update(f"{number}:".encode() + file.read_bytes())
    return found.hexdigest()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
