"""The actors of a run: reserved, started, wired to each other, and taken down again."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlkd.config.schema import Config
from rlkd.core.errors import InfrastructureError, LearnerLost, WorkerLost
from rlkd.core.ports import Services, Writer
from rlkd.core.together import together
from rlkd.inputs import Inputs
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import pack
from rlkd.site import Site, settled
from rlkd.staff import PROBE_S, Staff
from rlkd.teachers import reader
from rlkd.train.traces import LiveTraces
from rlkd.workers import cluster
from rlkd.workers.learner import LearnerGroup
from rlkd.workers.learner import spawner as learner_spawner
from rlkd.workers.placement import Placement
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.reward import RewardPool, WorkerOptions
from rlkd.workers.rollout import spawner
from rlkd.workers.roster import Roster
from rlkd.workers.threads import Threads, environment, plan

Tell = Callable[..., None]


@dataclass
class Fleet:
    """What the loop needs of the cluster. `learner` is None where nothing is trained (evaluation)."""

    services: Services
    learner: Any
    policy: Pool
    verify: RewardPool
    crews: Sequence[Any] = ()  # everybody who has workers that may move: Pools and the RewardPool
    roster: Roster | None = None  # who is where; None: nobody asks
    on_gpu: bool = False
    placement: Placement | None = None
    site: Site | None = None

    def metrics(self) -> dict[str, float]:
        """What the workers say of themselves: for the metrics of a step."""
        found = {**self.verify.metrics(), **self.policy.metrics(), "workers/rollout": float(self.policy.ready)}
        if self.site is not None and self.site.carrier is not None and self.site.carrier.times:
            found["sync/mib_to_other_nodes"] = self.site.carrier.bytes / 2**20  # since the start
        return found

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        config: Config,
        read: Inputs,
        directory: Path,
        tell: Tell,
        learner: bool = True,
        attempt: Path | None = None,
        was_draining: Callable[[str], bool] = lambda _: False,
    ) -> AsyncIterator["Fleet"]:
        """Start every actor the recipe asks for; they end with the context. PreflightError if the cluster cannot.

        `attempt`: where the roster and stacks go. `was_draining(node)`: what is lost there is nobody's fault.
        """
        async with AsyncExitStack() as stack:
            join(config, stack)
            roster = Roster(attempt, config.health.on_stall, tell) if attempt is not None else None
            builder = _Builder(config, read, directory, tell, stack, roster, was_draining)
            yield await builder.fleet(learner)

    def leave(self, nodes: Mapping[str, float | None]) -> None:
        """These nodes go away, each in so many seconds: their workers move."""
        for node, left_s in nodes.items():
            if self.placement is not None:
                self.placement.leave(node)  # first: the replacements must not wait for a place there
            for crew in self.crews:
                crew.leave(node, left_s)

    @classmethod
    @asynccontextmanager
    async def staff(cls, config: Config, read: Inputs, tell: Tell) -> AsyncIterator[Staff]:
        """The reference and the teachers alone, as a run would start them; nothing is written down."""
        async with AsyncExitStack() as stack:
            yield await _Builder(config, read, Path(), tell, stack).staff()


def join(config: Config, stack: AsyncExitStack) -> None:
    """Be in a Ray cluster until `stack` ends. An actor (a trial of a sweep) is in one already, and stays there."""
    if not ray.is_initialized():
        connect(config)
        stack.callback(ray.shutdown)


def connect(config: Config) -> None:
    """As workers.cluster.join, with what the recipe says."""
    cluster.join(f"rlkd-{config.name}", config.ray.address, int(config.ray.object_store_gib * 2**30))


@dataclass
class _Builder:
    config: Config
    read: Inputs
    directory: Path
    tell: Tell
    stack: AsyncExitStack
    roster: Roster | None = None
    was_draining: Callable[[str], bool] = lambda _: False

    async def fleet(self, learner: bool) -> Fleet:
        config, stacks = self.config, self.roster.stacks if self.roster is not None else None
        staff = Staff(config, self.read, self.directory, self.tell, self.stack, learner, self.was_draining, stacks)
        await staff.test_endpoints()
        ranks = config.learner.ranks if learner else 0
        await self._reserve(staff, ranks, True, config.verifier.workers)
        policy, verify = self._policy(), self._verify()
        group = self._learner(policy) if learner else None
        crews: list[Any] = [policy, verify, *staff.pools.values()]
        if self.roster is not None:
            for crew in crews:
                self.roster.add(crew.roster)
            if group is not None:
                self.roster.add(group.roster)
            keeping = asyncio.create_task(self.roster.keep(), name="roster")
            self.stack.callback(keeping.cancel)
        await self._bring_up({"rollout": policy, "reward": verify, **staff.pools, "learner": group})
        writers = staff.writers()
        services = Services(
            policy, verify, staff.teachers(), staff.reference(), self.read.tokenizer, writers,
            self._traces(writers, verify) if writers else None, self.tell, self.read.sampling(config),
        )  # fmt: skip
        return Fleet(services, group, policy, verify, crews, self.roster, self.site.gpu, self.placement, self.site)

    async def staff(self) -> Staff:
        """The frozen models alone, started."""
        staff = Staff(self.config, self.read, None, self.tell, self.stack)
        await staff.test_endpoints()
        if staff.counts():
            join(self.config, self.stack)
            await self._reserve(staff, 0, False, 0)
            await self._bring_up(staff.pools)
        return staff

    async def _reserve(self, staff: Staff, ranks: int, samplers: bool, verifiers: int) -> None:
        """Room for everybody on the cluster, and threads; and the pools of the staff, which need to know both."""
        counts, config = staff.counts(), self.config
        self.site: Site = await settled(
            config, self.directory, self.tell, self.stack, ranks, samplers, verifiers, counts
        )
        self.placement = self.site.placement
        beside, overlap = config.sampler.workers if samplers else 1, config.schedule.staleness > 0
        self.threads: Threads = plan(self.site.cores, beside, max(ranks, 1), sum(counts.values()), overlap)
        staff.make(self.placement, self.threads)

    async def _bring_up(self, parts: Mapping[str, Any]) -> None:
        """All at once: most of a start is imports, on one core each. On GPUs that they share one after the other, for
        vLLM measures what is free."""
        present = [(name, part) for name, part in parts.items() if part is not None]
        if not self.config.ray.share_gpus:
            await together([self._up(name, part) for name, part in present])
            return
        for name, part in present:
            await self._up(name, part)

    async def _up(self, name: str, part: Any) -> None:
        self.tell("starting", f"{name} workers")
        await started(part.start, name, self.config.learner.max_restarts, self.tell)
        for note in part.notes() if isinstance(part, RewardPool) else ():
            self.tell("sandbox", note)

    def _traces(self, writers: Mapping[str, Writer], verify: RewardPool) -> LiveTraces:
        most, success = self.config.sampler.max_tokens, self.config.evaluate.success
        path, read = self.directory / "traces.jsonl", reader(self.read.tokenizer)
        return LiveTraces(writers, read, verify, path, most, self.read.context, success, self.tell)

    def _model_options(self, path: str) -> dict[str, Any]:
        m = self.config.model
        return {
            "path": str(Path(path).resolve()),
            "context": m.context,
            "dtype": m.dtype,
            "device": m.device,
            "trust_remote_code": m.trust_remote_code,
        }

    def _policy(self) -> Pool:
        s = self.config.sampler
        threads = s.threads or self.threads.rollout
        options = {
            **self._model_options(self.config.model.path),
            "max_num_seqs": s.max_num_seqs,
            "tensor_parallel": s.tensor_parallel,
            "kv_cache_gib": s.kv_cache_gib,
            "gpu_memory_utilization": s.gpu_memory_utilization,
            "block_size": s.block_size,
            "prefix_caching": s.prefix_caching and not self.config.deterministic,
            "enforce_eager": s.enforce_eager,
            "threads": threads,
        }
        spawn = spawner(s.engine, options, environment(threads), lambda i: self.placement.options(f"rollout-{i}"))
        least = s.workers if s.min_workers is None else s.min_workers
        alone = 1 if self.config.deterministic else None  # what is computed beside a request changes its last bits
        limits = PoolOptions(
            timeout_s=s.timeout_s, sync_s=self.config.sync.timeout_s, probe_s=PROBE_S, at_once=alone,
            stall_s=s.stall_s, nobody_s=s.min_workers_timeout_s, replacements=s.replacements,
            in_window=s.replacements_in_10_min, at_least=s.min_workers or 1,
            start_with=None if self.site.samplers == least else least,
            hedge=None if self.config.deterministic else s.hedge,
        )  # fmt: skip
        pool = Pool(
            "rollout", spawn, self.site.samplers, self.read.sampling(self.config), limits, tell=self.tell,
            was_draining=self.was_draining, stacks=self.roster.stacks if self.roster is not None else None,
            seated=lambda i: self.site.seated(f"rollout-{i}"),
            bring=None if self.site.carrier is None else self.site.carrier.bring,
        )  # fmt: skip
        self.stack.callback(pool.close)
        return pool

    def _verify(self) -> RewardPool:
        v = self.config.verifier
        options = WorkerOptions(
            v.processes, v.timeout_s, v.memory_gib, v.min_tier, v.accept_unsafe_code, v.recheck_fraction,
            ray=self.placement.options, seated=self.site.reward_seated,
        )  # fmt: skip
        pool = RewardPool(
            pack(self.config.rewards), Mix.of(self.config.rewards), self.read.tokenizer.decode, v.workers, options,
            v.on_error, v.max_error_fraction, self.was_draining,
        )  # fmt: skip
        self.stack.callback(pool.close)
        return pool

    def _learner(self, policy: Pool) -> LearnerGroup:
        learner, model = self.config.learner, self.config.model
        threads = learner.threads or self.threads.learner
        how = {
            "path": str(Path(model.path).resolve()),
            "dtype": model.dtype,
            "device": model.device,
            "attention": model.attention,
            "trust_remote_code": model.trust_remote_code,
            "temperature": self.config.sampler.temperature,
            "head_rows": learner.head_rows,
            "share_prompt": learner.share_prompt,
            "gradient_checkpointing": learner.gradient_checkpointing,
        }
        same = ("lr", "betas", "weight_decay", "warmup_steps", "lr_schedule", "max_grad_norm", "zero_stage", "offload",
                "timeout_s", "on_nonfinite", "max_nonfinite")  # fmt: skip
        options = {name: getattr(learner, name) for name in same}
        options |= {"model": how, "steps": self.config.schedule.steps, "threads": threads}
        options["deterministic"] = self.config.deterministic
        options["debug_directory"] = str((self.directory / "debug").resolve())
        weights = self.site.published
        self.stack.callback(shutil.rmtree, weights, ignore_errors=True)
        spawn = learner_spawner(
            learner.ranks, str(weights), environment(threads), lambda rank: self.placement.options(f"learner-{rank}")
        )
        group = LearnerGroup(
            learner.ranks, spawn, options, self.config.algorithm, policy.deliver, withdraw=policy.withdraw,
            seated=self.site.learner_seated,
        )  # fmt: skip
        self.stack.push_async_callback(group.finish)
        return group


async def started(start: Callable[[], Awaitable[None]], name: str, more: int, tell: Tell) -> None:
    """Workers that are lost while they come up are started again, so many times; then InfrastructureError."""
    for left in range(more, -1, -1):
        try:
            await start()
        except (WorkerLost, LearnerLost) as lost:
            if not left:
                fix = "the same command starts again; Ray's logs say why the process ended"
                text = f"{name} was lost {more + 1} times before it was up; the last: {lost}"
                raise InfrastructureError("RLKD-I006", text, where="learner.max_restarts", fix=fix) from lost
            tell("worker_lost", f"{lost}; it had not come up yet and is started again ({left} tries left)")
        else:
            return
