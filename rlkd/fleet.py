"""The actors of a run: reserved, started, wired to each other, and taken down again."""

import math
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlkd.config.schema import Config, ScorerConfig
from rlkd.core.errors import PreflightError
from rlkd.core.ports import Services
from rlkd.core.types import Signal
from rlkd.inputs import Inputs, model_config
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import pack
from rlkd.workers.learner import LearnerGroup
from rlkd.workers.learner import spawner as learner_spawner
from rlkd.workers.placement import Placement, bundles, reserve
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.reward import RewardPool, WorkerOptions
from rlkd.workers.rollout import spawner
from rlkd.workers.scorer import spawner as scorer_spawner
from rlkd.workers.threads import Threads, environment, plan

Tell = Callable[..., None]
PROBE_S = 30.0  # a rollout worker that does not answer for this long is replaced
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Fleet:
    """What the loop needs of the cluster. `learner` is None where nothing is trained (evaluation)."""

    services: Services
    learner: Any

    @classmethod
    @asynccontextmanager
    async def start(
        cls, config: Config, read: Inputs, directory: Path, tell: Tell, learner: bool = True
    ) -> AsyncIterator["Fleet"]:
        """Start every actor the recipe asks for; they end with the context. PreflightError if the cluster cannot."""
        async with AsyncExitStack() as stack:
            connect(config)
            stack.callback(ray.shutdown)
            yield await _Builder(config, read, directory, tell, stack).fleet(learner)


def connect(config: Config) -> None:
    """Join the cluster of `ray.address` or RAY_ADDRESS, else start one on this machine."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {
        "object_store_memory": int(config.ray.object_store_gib * 2**30),
        "include_dashboard": False,
    }  # fmt: skip
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after ray.shutdown must fail, not start another cluster
    ray.init(address=address, namespace=f"rlkd-{config.name}", log_to_driver=False, **own)


@dataclass
class _Builder:
    config: Config
    read: Inputs
    directory: Path
    tell: Tell
    stack: AsyncExitStack

    async def fleet(self, learner: bool) -> Fleet:
        config = self.config
        self.gpu = self._gpu()
        scorers = self._scorers() if learner else {}
        ranks = config.learner.ranks if learner else 0
        counts = {name: s.workers for name, s in scorers.items()}
        wanted = bundles(
            ranks, config.sampler.workers, config.sampler.tensor_parallel, config.verifier.workers, counts, self.gpu
        )
        self.placement: Placement = await reserve(wanted, config.ray.wait_s)
        self.stack.callback(self.placement.release)
        self.threads: Threads = plan(
            _cores(), config.sampler.workers, max(ranks, 1), sum(counts.values()), config.schedule.staleness > 0
        )
        policy = self._policy()
        models = {name: self._scorer(name, s) for name, s in scorers.items()}
        verify = self._verify()
        group = self._learner(policy) if learner else None
        await self._bring_up(policy, models, verify, group)
        teachers = {name: m for name, m in models.items() if name in config.teachers}
        services = Services(policy, verify, teachers, models.get("reference"), self.read.tokenizer)
        return Fleet(services, group)

    async def _bring_up(self, policy: Pool, models: Mapping[str, Pool], verify: RewardPool, group: Any) -> None:
        """One after the other: on a small machine starts that overlap take longer than in turn."""
        for name, part in {"rollout": policy, "reward": verify, **models, "learner": group}.items():
            if part is not None:
                self.tell("starting", f"{name} workers")
                await part.start()

    def _gpu(self) -> bool:
        """Whether the roles get GPUs. PreflightError if GPUs are asked for and the cluster has none."""
        found = ray.cluster_resources().get("GPU", 0) > 0
        if self.config.model.device == "cuda" and not found:
            raise PreflightError(
                "RLKD-E021",
                "model.device=cuda, but no node of the cluster has a GPU",
                where="model.device",
                fix="set model.device=cpu (or auto), or join a cluster with GPUs (ray.address)",
            )
        return found and self.config.model.device != "cpu"

    def _scorers(self) -> dict[str, ScorerConfig]:
        needs = self.config.algorithm.needs
        wanted: dict[str, ScorerConfig] = {}
        if Signal.REFERENCE in needs:
            wanted["reference"] = self.config.reference
        if needs & {Signal.TEACHER, Signal.TEACHER_TOPK}:
            wanted |= self.config.teachers
        return wanted

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
            "prefix_caching": s.prefix_caching,
            "enforce_eager": s.enforce_eager,
            "threads": threads,
        }
        spawn = spawner(s.engine, options, environment(threads), lambda i: self.placement.options(f"rollout-{i}"))
        limits = PoolOptions(timeout_s=s.timeout_s, sync_s=self.config.sync.timeout_s, probe_s=PROBE_S)
        pool = Pool("rollout", spawn, s.workers, self.read.sampling(self.config), limits)
        self.stack.callback(pool.close)
        return pool

    def _scorer(self, name: str, scorer: ScorerConfig) -> Pool:
        path = scorer.path or self.config.model.path
        model_config(path)
        threads = scorer.threads or self.threads.scorer
        options = {**self._model_options(path), "max_tokens": scorer.max_tokens, "threads": threads}
        options |= {"temperature": self.config.sampler.temperature, "attention": self.config.model.attention}
        spawn = scorer_spawner(options, environment(threads), lambda i: self.placement.options(f"{name}-{i}"))
        pool = Pool(name, spawn, scorer.workers, options=PoolOptions(timeout_s=scorer.timeout_s))
        self.stack.callback(pool.close)
        return pool

    def _verify(self) -> RewardPool:
        v = self.config.verifier
        options = WorkerOptions(v.processes, v.timeout_s, v.memory_gib, ray=self.placement.options)
        pool = RewardPool(
            pack(self.config.rewards), Mix.of(self.config.rewards), self.read.tokenizer.decode, v.workers, options,
            v.on_error, v.max_error_fraction,
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
                "timeout_s")  # fmt: skip
        options = {name: getattr(learner, name) for name in same}
        options |= {"model": how, "steps": self.config.schedule.steps, "threads": threads}
        options["debug_directory"] = str((self.directory / "debug").resolve())
        weights = _weights_directory(self.config, self.directory)
        self.stack.callback(shutil.rmtree, weights, ignore_errors=True)
        spawn = learner_spawner(
            learner.ranks, str(weights), environment(threads), lambda rank: self.placement.options(f"learner-{rank}")
        )
        group = LearnerGroup(learner.ranks, spawn, options, self.config.algorithm, policy.deliver)
        self.stack.push_async_callback(group.finish)
        return group


def _cores() -> int:
    """Cores of the cluster's smallest node: threads are planned for the worst."""
    cpus = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]
    return max(1, math.floor(min(c for c in cpus if c > 0)))


def _weights_directory(config: Config, directory: Path) -> Path:
    """Where weights pass from learner to samplers: shared memory, or a directory every node sees."""
    if config.sync.kind == "disk":
        return Path(config.sync.path) if config.sync.path else directory / "weights"
    if not SHARED_MEMORY.is_dir():
        raise PreflightError("RLKD-E022", f"there is no {SHARED_MEMORY}", where="sync.kind", fix="set sync.kind=disk")
    return Path(tempfile.mkdtemp(prefix=f"rlkd-{config.name}-", dir=SHARED_MEMORY))
