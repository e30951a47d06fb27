"""The frozen models that a run asks: pools of scorers and writers, endpoints. The same settings share one pool."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.config.schema import Config, ScorerConfig, TeacherConfig, WriterConfig
from rlkd.core.ports import Model, Sampling, Writer, Written
from rlkd.engines.budget import Budget, Limits
from rlkd.engines.endpoint import Endpoint, EndpointOptions
from rlkd.inputs import Inputs
from rlkd.model_folder import model_config, vocabulary
from rlkd.report import secrets
from rlkd.teachers import (
    key_of,
    scored_by,
    scorer_role,
    scorers,
    unavailable,
    workers_of,
    writer_role,
    writers,
    written_by,
)
from rlkd.workers.crew import Stacks
from rlkd.workers.limits import Advice
from rlkd.workers.placement import Placement
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.rollout import spawner as writer_spawner
from rlkd.workers.scorer import spawner as scorer_spawner
from rlkd.workers.teacher import Dispensable, Teacher
from rlkd.workers.threads import Threads, environment
from rlkd.workers.writer import LocalWriter

Tell = Callable[..., None]
PROBE_S = 30.0  # a worker that does not answer for this long is replaced


@dataclass
class Staff:
    """`asked=False`: nobody, for an evaluation. Pools and clients are closed with `stack`."""

    config: Config
    read: Inputs
    directory: Path | None  # where accounts are kept; None: nowhere
    tell: Tell
    stack: AsyncExitStack
    asked: bool = True
    was_draining: Callable[[str], bool] = lambda _: False
    stacks: Stacks | None = None
    pools: dict[str, Pool] = field(default_factory=dict, init=False)  # by role; to be started in this order

    def __post_init__(self) -> None:
        self._scorers = scorers(self.config) if self.asked else {}
        every = writers(self.config) if self.asked else {}
        self._local = {name: t for name, t in every.items() if t.endpoint is None}
        self._remote = {name: t for name, t in every.items() if t.endpoint is not None}
        self._scored_by = scored_by(self.config) if self.asked else {}
        self._written_by = written_by(self.config) if self.asked else {}
        self._endpoints: dict[str, Endpoint] = {}

    def counts(self) -> dict[str, int]:
        """Workers of each role, for placement and threads."""
        return workers_of(self.config) if self.asked else {}

    async def test_endpoints(self) -> None:
        """Make the endpoints, and ask each a small question. RlkdError says what is wrong with one."""
        for name, teacher in self._remote.items():
            made = self._endpoints[name] = self._endpoint(name, teacher)
            self.stack.push_async_callback(made.close)
            said = " ".join((await made.self_test()).split())
            self.tell("teacher", f"teachers.{name}: {made.options.model} at {made.options.url} answers: {said[:60]!r}")

    def make(self, placement: Placement, threads: Threads) -> None:
        """The pools, not started."""
        for name in dict.fromkeys(self._scored_by.values()):
            self._add(scorer_role(name), self._scorer(name, self._scorers[name], placement, threads))
        for name in dict.fromkeys(self._written_by.values()):
            self._add(writer_role(name), self._writer(name, self._local[name], placement, threads))

    def reference(self) -> Model | None:
        return self._pool_of("reference") if "reference" in self._scorers else None

    def teachers(self) -> dict[str, Model]:
        """Those that score, by name. Says once what cannot be known of them."""
        found: dict[str, Model] = {}
        policy_ids = vocabulary(model_config(self.config.model.path))
        for name in self._scorers:
            if name == "reference":
                continue
            frozen = self.read.frozen[name]
            if frozen.foreign_ends:
                ends = self.read.tokenizer.decode(np.array(frozen.foreign_ends, np.int32), special=True)
                text = f"teachers.{name} does not end its answers with {ends!r}: its log-prob there stays unknown (NaN)"
                self.tell("teacher", text)
            key, pool = f"teachers.{name}", self._pool_of(name)
            skipped = unavailable(self._scorers[name]) == "skip_kd"
            model = Dispensable(key, pool, self.tell) if skipped else pool
            found[name] = Teacher(
                key, model, frozen.context, frozen.vocabulary, policy_ids,
                frozen.foreign_ends, self.tell,
            )  # fmt: skip
        return found

    def writers(self) -> dict[str, Writer]:
        """Those that write, by name."""
        local: dict[str, Writer] = {name: self._local_writer(name, t.writer) for name, t in self._local.items()}
        return local | {name: Discreet(endpoint) for name, endpoint in self._endpoints.items()}

    # --- one of them

    def _pool_of(self, name: str) -> Pool:
        return self.pools[scorer_role(self._scored_by[name])]

    def _add(self, role: str, pool: Pool) -> None:
        self.pools[role] = pool
        self.stack.callback(pool.close)

    def _scorer(self, name: str, scorer: ScorerConfig, placement: Placement, threads: Threads) -> Pool:
        role, n = scorer_role(name), scorer.threads or threads.scorer
        options = {
            **self._folder(name),
            "context": self.read.frozen[name].context,
            "max_tokens": scorer.max_tokens,
            "threads": n,
            "temperature": self.config.sampler.temperature,
            "attention": self.config.model.attention,
        }
        spawn = scorer_spawner(options, environment(n), lambda i: placement.options(f"{role}-{i}"))
        return self._crew(name, role, spawn, scorer, f"lower {key_of(name)}.max_tokens", placement)

    def _writer(self, name: str, teacher: TeacherConfig, placement: Placement, threads: Threads) -> Pool:
        role, n, w = writer_role(name), teacher.threads or threads.scorer, teacher.writer
        same = ("context", "max_num_seqs", "kv_cache_gib", "gpu_memory_utilization")
        options = {**self._folder(name), **{key: getattr(w, key) for key in same}, "threads": n}
        spawn = writer_spawner(w.engine, options, environment(n), lambda i: placement.options(f"{role}-{i}"))
        key = f"{key_of(name)}.writer"
        memory = f"lower {key}.max_num_seqs or {key}.kv_cache_gib (on GPU {key}.gpu_memory_utilization)"
        return self._crew(name, role, spawn, teacher, memory, placement)

    def _crew(
        self, name: str, role: str, spawn: Callable[[int], Any], model: ScorerConfig, memory: str, placement: Placement
    ) -> Pool:
        key = key_of(name)
        slow = f"raise {key}.timeout_s or {key}.stall_s"
        advice = Advice(memory, slow, nodes="add nodes", engine=f"{key}.writer.engine=hf")
        options = PoolOptions(timeout_s=model.timeout_s, probe_s=PROBE_S, stall_s=model.stall_s, advice=advice)
        if unavailable(model) == "fail":
            options = replace(options, replacements=0)
        if unavailable(model) == "skip_kd":
            options = replace(options, patient=False)
        return Pool(
            role, spawn, model.workers, options=options, tell=self.tell, was_draining=self.was_draining,
            stacks=self.stacks, seated=lambda i: placement.seated(f"{role}-{i}"),
        )  # fmt: skip

    def _folder(self, name: str) -> dict[str, Any]:
        m = self.config.model
        path = self.read.frozen[name].path
        return {"path": path, "dtype": m.dtype, "device": m.device, "trust_remote_code": m.trust_remote_code}

    def _local_writer(self, name: str, w: WriterConfig) -> LocalWriter:
        frozen, pool = self.read.frozen[name], self.pools[writer_role(self._written_by[name])]
        sampling = Sampling(w.max_tokens, w.temperature, w.top_p, frozen.tokenizer.stop_tokens)
        context = w.context or frozen.context
        return LocalWriter(
            f"teachers.{name}", pool, frozen.tokenizer, sampling, context, w.chat, w.system, self.tell
        )  # fmt: skip

    def _endpoint(self, name: str, teacher: TeacherConfig) -> Endpoint:
        e, w = teacher.endpoint, teacher.writer
        assert e is not None
        limits = Limits(e.max_total_tokens, e.max_cost, e.price_in, e.price_out)
        path = None if self.directory is None else self.directory / "teachers" / f"{name}.json"
        asked = ("url", "model", "key_env", "requests_per_minute", "at_once", "retries", "timeout_s")
        written = ("max_tokens", "temperature", "top_p", "system")
        options = {key: getattr(e, key) for key in asked} | {key: getattr(w, key) for key in written}
        key = f"teachers.{name}"
        return Endpoint(key, EndpointOptions(**options), Budget(key, limits, path, self.tell), self.tell)

    # --- who is the same


@dataclass(frozen=True)
class Discreet:
    """A writer whose texts have no secret in them. What an endpoint writes is kept (traces.jsonl), and trained on; one
    that sends back what it was sent, headers and all, must not put the key there."""

    writer: Writer

    async def write(self, messages: Sequence[Mapping[str, str]], seed: int = 0) -> Written:
        written = await self.writer.write(messages, seed)
        return replace(written, text=secrets.without(written.text))
