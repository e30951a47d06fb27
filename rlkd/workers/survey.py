"""What other nodes must have in common with the driver's: the packages, and the folders that several nodes write to.

One short task on each node looks. The folder is tried, not guessed: the driver writes a file there, the node must read
it and write another one, which the driver must read.
"""

import asyncio
import logging
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlkd.core.errors import PreflightError, Problem
from rlkd.workers.aside import OneAtATime, aside
from rlkd.workers.nodes import ASK_S, alive

log = logging.getLogger("rlkd.workers")
PACKAGES = ("rlkd", "torch", "transformers", "ray", "vllm", "deepspeed", "numpy")
SEE_S = 5.0  # for a file that one node wrote to be seen by another: network file systems look again now and then
ANSWER_S = 60.0  # for a node to start a process and answer
GONE_S = 30.0  # for Ray to see that a node which did not answer is gone: it misses a few heartbeats first
AGAIN_S = 1.0  # between two looks whether it is


@dataclass(frozen=True)
class Seen:
    """What a node says of itself."""

    packages: Mapping[str, str]
    folder: str | None  # what is wrong with the folder there; None: nothing, or it was not asked


def packages() -> dict[str, str]:
    """Versions of what must be the same everywhere; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def look(folder: str | None, token: str, node: str) -> Seen:
    """Runs on the node."""
    return Seen(packages(), None if folder is None else _answered(Path(folder), token, node))


def _answered(folder: Path, token: str, node: str) -> str | None:
    try:
        if not _comes(folder / token):
            return "it does not see what the driver writes there"
        (folder / f"{token}-{node}").write_text(node)
    except OSError as error:
        return f"it cannot be used there: {error.strerror}"
    return None


def _comes(path: Path) -> bool:
    until = time.monotonic() + SEE_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


async def survey(folders: Mapping[str, Path | None], own: str) -> list[str]:
    """Look at these nodes: each has a folder that it must share with this one (node id `own`), or none. PreflightError
    that names every node, what differs there, and what to do. Returns the names of those that went away meanwhile:
    whoever was to be there is given another place, as later in the run."""
    names = {node.id: node.name for node in await aside(alive)}
    others = {node: folder for node, folder in folders.items() if node != own}
    every = [(names.get(node, node[:8]), node, folder) for node, folder in others.items()]
    found = await asyncio.gather(*(_surveyed(*one) for one in every))
    if problems := [problem for some in found for problem in some or ()]:
        raise PreflightError.of(problems)
    return [name for (name, _, _), some in zip(every, found, strict=True) if some is None]


async def _surveyed(name: str, node: str, folder: Path | None) -> list[Problem] | None:
    """What is wrong with it; None if it is gone."""
    token = f".seen-{time.time_ns():x}"
    written = [] if folder is None else [folder / token, folder / f"{token}-{node[:12]}"]
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written[0].write_text(node)
        seen = await _asked(node, None if folder is None else str(folder.resolve()), token)
        if seen is None or isinstance(seen, Problem):
            return None if seen is None else [seen]
        wrong = seen.folder
        if folder is not None and wrong is None and not await asyncio.to_thread(_comes, written[1]):
            wrong = "what it writes there is not seen here"
        problems = _different(name, seen.packages)
        return problems if folder is None or wrong is None else [*problems, _own(name, folder, wrong)]
    finally:
        for path in written:
            path.unlink(missing_ok=True)


async def _asked(node: str, folder: str | None, token: str) -> Seen | Problem | None:
    """What it says of itself, why it does not; None if it is gone."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        future = task.remote(folder, token, node[:12]).future()
        async with asyncio.timeout(ANSWER_S):
            seen: Seen = await asyncio.wrap_future(future)
    except TimeoutError:
        return None if await _gone(node, 0) else _silent(node, f"no answer within {ANSWER_S:g} s")
    except RayTaskError as error:  # the node is there: it says so itself
        return _failed(node, error.cause)
    except RayError as error:
        return None if await _gone(node, GONE_S) else _failed(node, error)
    return seen


async def _gone(node: str, within_s: float) -> bool:
    """Whether Ray takes the node for dead, within so many seconds."""
    until, ask = time.monotonic() + within_s, OneAtATime(ASK_S)
    while True:
        try:
            if all(known.id != node for known in await ask(alive)):
                return True
        except Exception as error:  # Ray's own errors of all kinds: nobody knows, and the node is told as silent
            log.warning("Ray does not say whether node %s is alive: %s: %s", node[:8], type(error).__name__, error)
        if time.monotonic() >= until:
            return False
        await asyncio.sleep(AGAIN_S)


def _failed(node: str, cause: BaseException) -> Problem:
    return _silent(node, f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")


def _silent(node: str, why: str) -> Problem:
    return Problem(
        "RLKD-E026",
        f"node {node[:8]} cannot run rlkd: {why}",
        where="ray",
        fix="the same image or virtual environment on every node; `rlkd doctor` there says what is missing",
    )


def _different(name: str, there: Mapping[str, str], here: Callable[[], Mapping[str, str]] = packages) -> list[Problem]:
    """Packages of another version, or missing there."""
    apart = [f"{p} {there.get(p, 'is not installed')} there, {v} here" for p, v in here().items() if there.get(p) != v]
    if not apart:
        return []
    fix = "the same image or virtual environment on every node"
    return [Problem("RLKD-E025", f"node {name} has other packages: {'; '.join(apart)}", where="ray", fix=fix)]


def _own(name: str, folder: Path, wrong: str) -> Problem:
    return Problem(
        "RLKD-E024",
        f"node {name} does not share this folder with the driver: {wrong}",
        where=str(folder.resolve()),
        fix="give a path on a file system that all nodes of the learner mount (NFS, Lustre, a shared volume): "
        "report.directory, and sync.path if sync.kind=disk. checkpoint.remote does not replace it",
    )
