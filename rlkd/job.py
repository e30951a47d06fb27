"""The parts of a training job that know the recipe: where it saves, and what looks after it."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlkd.config.schema import Config
from rlkd.core.errors import PreflightError
from rlkd.core.stop import Stop
from rlkd.fleet import Fleet
from rlkd.report.files import read_lines
from rlkd.report.history import latest
from rlkd.store.remote import Remote
from rlkd.store.retention import Keep
from rlkd.store.store import Store
from rlkd.train.canary import Canary
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.guards import Guards
from rlkd.train.health import Alarms, Limits, bounds
from rlkd.train.no_signal import PassRates

PACKAGES = ("rlkd", "torch", "transformers", "deepspeed", "ray", "numpy")


def checkpoints(config: Config, directory: Path, tell: Callable[..., None], attempt: int) -> Checkpoints:
    """Of the run in `directory`, as the recipe wants them. Each says which attempt wrote it (fork.py asks)."""
    c = config.checkpoint
    remote = Remote(f"{c.remote.rstrip('/')}/{config.name}") if c.remote is not None else None
    keep = Keep(c.keep, c.keep_every, c.keep_best)
    store = Store(directory / "checkpoints", keep, _from_any_thread(tell), remote)
    versions = {name: version(name) for name in PACKAGES}
    facts = {"run": config.name, "attempt": attempt, "versions": versions, "topology": topology(config)}
    return Checkpoints(store, c.every, c.between_failures_s, facts)


def saved_before(directory: Path) -> int | None:
    """The newest step that earlier attempts of the run say they saved."""
    try:
        events = read_lines(directory / "events.jsonl")
    except ValueError:
        return None
    return max((e["step"] for e in events if e.get("kind") == "checkpoint" and "step" in e), default=None)


def refuse_remote(config: Config) -> None:
    """`--resume never`: PreflightError if the remote store has checkpoints of a run of this name."""
    remote = config.checkpoint.remote
    if remote is not None and (steps := Remote(f"{remote.rstrip('/')}/{config.name}").steps()):
        raise PreflightError(
            "RLKD-E162",
            f"--resume never, but the remote store has checkpoints of this run (newest: step {max(steps)})",
            where=f"{remote}/{config.name}",
            fix="give another name=…, or --resume auto to go on with it",
        )


def _from_any_thread(tell: Callable[..., None]) -> Callable[..., None]:
    """The store is used from threads, and a report from the event loop's alone."""
    loop, own = asyncio.get_running_loop(), threading.get_ident()

    def told(*said: Any, **fields: Any) -> None:
        if threading.get_ident() == own:
            tell(*said, **fields)
        else:
            loop.call_soon_threadsafe(functools.partial(tell, *said, **fields))

    return told


def topology(config: Config) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same bit by bit."""
    sampler, learner = config.sampler, config.learner
    return {
        "engine": sampler.engine,
        "samplers": sampler.workers,
        "tensor_parallel": sampler.tensor_parallel,
        "ranks": learner.ranks,
        "zero_stage": learner.zero_stage,
        "max_tokens": learner.max_tokens,
    }


def guards(config: Config, fleet: Fleet, directory: Path, tell: Callable[..., None]) -> Guards:
    """What looks after the run of this fleet in `directory`."""
    h, roster = config.health, fleet.roster
    low = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and fleet.on_gpu)
    limits = bounds("bfloat16" if low else "float32", h.mismatch_warn, h.mismatch_stop, h.canary)
    when = Limits(h.length_growth, h.entropy_share, h.repetition, h.truncated)
    alarms = Alarms(limits, when, lambda: past_rows(directory, tell), rates=PassRates(config.evaluate.success))
    learner, policy = fleet.learner, fleet.policy
    canary = Canary(h.canary_every, limits, learner.probe, policy.canary, learner.publish, tell)
    found = Guards(alarms, canary, metrics=fleet.metrics)
    if roster is not None:
        found.stalled, found.counters = roster.stalled, roster.counters
    return found


def past_rows(directory: Path, tell: Callable[..., None]) -> list[dict[str, Any]]:
    """One row a step that the run has done, of the attempt that did it last; none, and told, if the file is broken."""
    try:
        return latest(read_lines(directory / "metrics.jsonl"))
    except (ValueError, KeyError) as broken:
        tell("warning", f"the alarms do not know the steps before this attempt: {broken}")
        return []


@asynccontextmanager
async def closing(saves: Checkpoints, config: Config, stop: Stop) -> AsyncIterator[None]:
    """What dead attempts left half-written goes first; at the end, copies under way get their time, if there is any."""
    if left := await asyncio.to_thread(saves.store.clean):
        saves.store.tell("store", f"removed what an earlier attempt left unfinished: {', '.join(left)}")
    try:
        yield
    finally:
        most, soon = config.checkpoint.upload_wait_s, stop.left_s()
        wait_s = most if soon is None else min(most, soon / 2)
        await asyncio.to_thread(saves.store.close, wait_s)
