"""Where a run's actors are on the cluster: room for them, what their nodes must share, how weights get there."""

import asyncio
import hashlib
import math
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import ray

from rlkd.config.schema import Config, RayConfig
from rlkd.core.errors import NodesGone, PreflightError
from rlkd.workers import drain
from rlkd.workers.aside import aside
from rlkd.workers.carrier import Carrier, porters
from rlkd.workers.nodes import alive, in_words, watched
from rlkd.workers.placement import Placement, bundles, reserve
from rlkd.workers.survey import survey
from rlkd.workers.threads import environment

Tell = Callable[..., None]
SHARED_MEMORY = Path("/dev/shm")
SAY_S = 10.0  # between lines about a node that the learner waits for


@dataclass
class Site:
    """Of one run, in `directory`."""

    config: Config
    directory: Path
    tell: Tell
    placement: Placement
    gpu: bool = False  # whether the roles have GPUs
    carrier: Carrier | None = None  # None: every worker reads what the learner wrote
    _checked: set[tuple[str, Path | None]] = field(default_factory=set, init=False)

    @property
    def samplers(self) -> int:
        """Rollout workers at most."""
        return sum(role.startswith("rollout-") for role in self.placement.seats)

    @property
    def cores(self) -> int:
        """For which threads are planned: those of the smallest node, for that is the worst."""
        if self.placement.cores is not None:
            return self.placement.cores
        cpus = [node.total.get("CPU", 0.0) for node in alive()]
        return max(1, math.floor(min(c for c in cpus if c > 0)))

    async def check(self, roles: Collection[str] | None = None) -> None:
        """The nodes of these roles (None: of all) that were not looked at yet have the driver's packages, those of the
        learner also the run's folder, or PreflightError."""
        where, own, sync = await aside(lambda: self.placement.where(roles)), drain.own_node(), self.config.sync
        folders: dict[str, Path | None] = dict.fromkeys(where.values())
        if sync.kind == "disk":
            folders |= {node: self.published for role, node in where.items() if role.startswith("rollout-")}
        folders |= {node: self.directory for role, node in where.items() if role.startswith("learner-")}
        new = {node: folder for node, folder in folders.items() if (node, folder) not in self._checked}
        for name in await survey(new, own):
            self.tell("nodes", f"node {name} went away while it was looked at: who was to be there waits for another")
        self._checked |= set(new.items())

    async def seated(self, role: str) -> None:
        """Returns when there is room for `role`. Of a node that joined with other packages it warns."""
        await self.placement.seated(role)
        try:
            await self.check([role])
        except Exception as error:  # Ray's own errors of all kinds, too: the worker will show whether it can work there
            self.tell("warning", f"{role}: {error}")

    async def learner_seated(self) -> None:
        """Returns when there is room for every rank, on nodes that share the run's folder. NodesGone if there is none
        for `sampler.min_workers_timeout_s`."""
        await self._wait("learner-0", "the learner", " (with the resource `stable`, if the cluster uses it)")
        await self.check([role for role in self.placement.seats if role.startswith("learner-")])

    async def reward_seated(self, role: str) -> None:
        """Returns when there is room for this reward worker. NodesGone as above."""
        await self._wait(role, role)

    async def _wait(self, role: str, whom: str, which: str = "") -> None:
        limit = self.config.sampler.min_workers_timeout_s
        waiting = asyncio.ensure_future(self.placement.seated(role))
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            while not (await asyncio.wait({waiting}, timeout=SAY_S))[0]:
                waited = loop.time() - began
                self.tell("waiting", f"{whom}: no node with room for {waited:.0f} s; giving up after {limit:g} s")
                if waited > limit:
                    fix = f"add nodes{which}; the same command continues"
                    raise NodesGone("RLKD-I614", f"no node for {whom} for {waited:.0f} s", "ray", fix)
            await waiting
        finally:
            waiting.cancel()

    @property
    def published(self) -> Path:
        """Where the learner writes weights down: shared memory, or a directory every node sees."""
        sync = self.config.sync
        if sync.kind == "disk":
            return Path(sync.path) if sync.path else self.directory / "weights"
        if not SHARED_MEMORY.is_dir():
            fix = "set sync.kind=disk"
            raise PreflightError("RLKD-E022", f"there is no {SHARED_MEMORY}", where="sync.kind", fix=fix)
        place = hashlib.blake2b(str(self.directory.resolve()).encode(), digest_size=6).hexdigest()
        return SHARED_MEMORY / f"rlkd-{self.config.name}-{place}"  # the same after a kill: leavings are removed then


async def settled(
    config: Config, directory: Path, tell: Tell, stack: AsyncExitStack, ranks: int, samplers: bool, verifiers: int,
    scorers: Mapping[str, int],
) -> Site:  # fmt: skip
    """Room for everybody, or PreflightError; given back with `stack`. Says who is where, if there are several nodes."""
    s, nodes, gpu = config.sampler, await aside(alive), await _on_gpu(config, tell)
    shared = gpu and config.ray.share_gpus
    least = s.workers if s.min_workers is None else s.min_workers
    most = s.workers if s.max_workers is None else s.max_workers
    every = bundles(
        ranks, most if samplers else 0, s.tensor_parallel, verifiers, scorers, gpu, shared,
        stable=any(node.stable for node in nodes),
    )  # fmt: skip
    later = {f"rollout-{i}" for i in range(least, most)}
    wanted, more = [b for b in every if b.role not in later], [b for b in every if b.role in later]
    together = config.sync.kind == "shm" and ranks > 0
    try:
        placement = await reserve(wanted, config.ray.wait_s, more, together, shared)
    except PreflightError as error:
        if gpu and not await aside(_any_gpu):
            raise _no_gpu() from error
        raise
    site = Site(config, directory, tell, placement, gpu)
    stack.callback(site.placement.release)
    if ranks and samplers and config.sync.kind in ("auto", "ray"):
        folder = f"{site.published}-copy"
        site.carrier = Carrier(porters(folder, environment(1)), config.sync.timeout_s, config.sync.kind == "ray")
        stack.push_async_callback(site.carrier.close)
    await _look_around(site, stack)
    return site


async def _on_gpu(config: Config, tell: Tell) -> bool:
    """Whether the roles get GPUs. `cuda` asks for them even if there are none yet: an autoscaler adds nodes for what
    somebody waits for. `auto` takes what is there now."""
    device, found = config.model.device, await aside(_any_gpu)
    if device == "cuda" and not found and (config.ray.address or os.environ.get("RAY_ADDRESS") or "local") == "local":
        raise _no_gpu()  # nobody adds one to a cluster that was started here
    if device == "auto" and not found and config.ray.wait_s > RayConfig().wait_s:
        text = "no node has a GPU now, and model.device=auto takes what is there: the run uses CPUs"
        tell("warning", f"{text}. Where GPU nodes come later (an autoscaler), say model.device=cuda")
    return device == "cuda" or (found and device != "cpu")


def _any_gpu() -> bool:
    return float(ray.cluster_resources().get("GPU", 0.0)) > 0


def _no_gpu() -> PreflightError:
    return PreflightError(
        "RLKD-E021",
        "model.device=cuda, but no node of the cluster has a GPU",
        where="model.device",
        fix="set model.device=cpu (or auto), join a cluster with GPUs (ray.address), or wait longer for them "
        "(ray.wait_s)",
    )


async def _look_around(site: Site, stack: AsyncExitStack) -> None:
    """Who is where, if there is a choice; from then on, which nodes come and go."""
    where, nodes = await aside(site.placement.where), await aside(alive)
    if len(nodes) > 1:
        site.tell("placement", in_words({"the driver": drain.own_node(), **where}, nodes))
    await site.check()
    task = asyncio.create_task(watched(site.tell, site.placement.tidy), name="watch of the nodes")

    async def ended() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(ended)
