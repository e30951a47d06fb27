"""Rewards on Ray: actors that each hold a jail, and the driver's side of them, which is the port `Verify`."""

import asyncio
import importlib
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
from jaxtyping import Int32

from rlkd.core.errors import WorkerLost
from rlkd.core.faults import fault
from rlkd.core.types import Answer, Origin, Prompt, Sample
from rlkd.core.verdict import Verdict
from rlkd.workers import stacks
from rlkd.workers.ask import call
from rlkd.workers.losses import Kind, kind_of
from rlkd.workers.repro import Repro
from rlkd.workers.tally import Mixer, OnError, Tally
from rlkd.workers.vitals import Place, here

ATTEMPTS = 3  # workers a group may lose; judging is pure, so it can be asked for again
ANSWER_S = 30.0  # for a worker to answer beyond what judging takes
START_S = 180.0  # for an actor to come up and load the rewards


class RewardWorker:
    """The actor: a jail, and as many threads as it has children to wait for them."""

    def __init__(self, jail: str, rewards: bytes, processes: int, limits: Mapping[str, Any]) -> None:
        module, _, name = jail.partition(":")
        self._jail = getattr(importlib.import_module(module), name)(rewards, processes, **limits)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="jail")

    async def start(self) -> dict[str, Any]:
        """Loads the rewards. Their names, the most seconds a group can take, what starting took, its place, and where
        code that models wrote runs, if a reward runs any."""
        began = time.monotonic()
        stacks.listen()
        names = await asyncio.get_running_loop().run_in_executor(self._threads, self._jail.start)
        told = {"names": names, "longest_s": self._jail.longest_s, "seconds": time.monotonic() - began, "place": here()}
        return told | {"standing": getattr(self._jail, "standing", None)}

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        fault("reward.score")
        loop = asyncio.get_running_loop()
        verdicts: list[Verdict] = await loop.run_in_executor(self._threads, self._jail.score, prompt, answers)
        return verdicts

    async def pid(self) -> int:
        return os.getpid()


@dataclass(frozen=True)
class WorkerOptions:
    """How each reward worker is made; the numbers are those of the recipe's `verifier`."""

    processes: int = 1
    timeout_s: float = 10.0
    memory_gib: float = 2.0
    min_tier: str = "userns+landlock"
    accept_unsafe_code: bool = False
    recheck_fraction: float = 0.0
    jail: str = "rlkd.engines.jail:Jail"
    ray: Callable[[str], Mapping[str, Any]] = lambda name: {}  # noqa: ARG005 – options of the actor of that name: its place
    seated: Callable[[str], Awaitable[None]] | None = None  # returns when it has a place; None: it has one

    @property
    def limits(self) -> dict[str, Any]:
        """What the jail is made with."""
        names = ("timeout_s", "memory_gib", "min_tier", "accept_unsafe_code", "recheck_fraction")
        return {name: getattr(self, name) for name in names}


class RewardPool:
    """Scores groups on `workers` actors: the port `Verify`. All of it runs on the driver's event loop.

    `rewards` come from rlkd.rewards.table.pack, `mix` from rlkd.rewards.mix.Mix.of; `text_of` decodes the tokens after
    the prompt, without special tokens. A lost worker is replaced and its group judged again; WorkerLost if that fails
    ATTEMPTS times, not counting losses on nodes that `was_draining` knows to go away. DataError as Tally says.
    """

    def __init__(
        self,
        rewards: bytes,
        mix: Mixer,
        text_of: Callable[[Int32[np.ndarray, "_"]], str],
        workers: int = 1,
        options: WorkerOptions = WorkerOptions(),
        on_error: OnError = "fail",
        max_error_fraction: float = 0.05,
        was_draining: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._text_of, self._was_draining = text_of, was_draining
        self._tally = Tally(mix, on_error, max_error_fraction, Repro(rewards, options.limits))
        self._workers = [_Worker(f"reward-{i}", rewards, options) for i in range(workers)]

    async def start(self) -> None:
        """Brings every worker up; without it each comes up with its first group. DataError RLKD-D303 if the rewards
        cannot be loaded there, WorkerLost if an actor does not come up."""
        await asyncio.gather(*(w.up() for w in self._workers))

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        if not samples:
            return ()
        answers = [self._answer(s) for s in samples]
        return self._tally.settle(prompt, samples, answers, await self._verdicts(prompt, answers))

    def counts(self) -> dict[str, int]:
        """Answers by outcome since the start, and workers lost."""
        return self._tally.counts()

    def leave(self, node: str, left_s: float | None = None) -> int:
        """The node goes away in `left_s` seconds: its workers get no more groups, and end when they have none left or
        their time is up; the next group makes another one elsewhere. How many there are."""
        return sum(worker.leave(node, left_s) for worker in self._workers)

    def roster(self) -> dict[str, dict[str, Any]]:
        """Who is where, and how many groups it has or will have, for `rlkd why-stuck`."""
        return {w.name: {**w.where(), "state": w.state, "calls": w.busy} for w in self._workers}

    def metrics(self) -> dict[str, float]:
        """`verifier_disagreement`: of answers judged twice, the share with other scores; nothing if none is."""
        share = self._tally.disagreement()
        return {} if math.isnan(share) else {"verifier_disagreement": share}

    def notes(self) -> list[str]:
        """What a run must say of where code that models wrote runs; nothing if no reward runs any."""
        notes = []
        for worker in self._workers:
            if (s := worker.standing) is not None:
                warning = f"WARNING, accepted by verifier.accept_unsafe_code: {s['reason']}; " if s["unsafe"] else ""
                notes.append(f"{warning}{worker.name} runs the models' code in tier {s['tier']}")
        return notes

    def close(self) -> None:
        """Ends the actors, and with them their children."""
        for worker in self._workers:
            worker.close()

    def _answer(self, sample: Sample) -> Answer:
        written = sample.tokens[sample.origin != Origin.PROMPT]
        return Answer(self._text_of(written), sample.finish, len(written))

    async def _verdicts(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        prompt = replace(prompt, demonstrations=())  # worked answers may be long, and no verifier looks at them
        attempts = 0
        while True:
            worker = min(self._workers, key=lambda w: w.busy)
            try:
                return await worker.score(prompt, answers)
            except WorkerLost as e:
                self._tally.count("workers_lost")
                draining = worker.lost_at is not None and self._was_draining(worker.lost_at.node)
                attempts += kind_of(e, draining) is not Kind.PREEMPT
                if attempts == ATTEMPTS:
                    raise WorkerLost(f"{e} (attempt {ATTEMPTS} to judge prompt {prompt.id!r})") from e


class _Worker:
    """The driver's handle of one actor: at most `processes` groups at once, a new actor when it is lost."""

    def __init__(self, name: str, rewards: bytes, options: WorkerOptions) -> None:
        self.name, self.busy, self.state = name, 0, "not started"
        self.lost_at: Place | None = None  # of the last one that was lost
        self._rewards, self._options = rewards, options
        self._actor: Any = None
        self._place: Place | None = None
        self._under_way: dict[Any, int] = {}  # calls by actor, also of one that leaves
        self._ending: dict[Any, asyncio.TimerHandle | None] = {}  # actors that leave their node
        self._longest_s = 0.0
        self.standing: Mapping[str, Any] | None = None  # of its jail, see Jail.standing
        self._starting = asyncio.Lock()
        self._free = asyncio.Semaphore(options.processes)

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        self.busy += 1
        try:
            async with self._free:  # waiting here, not in the actor, keeps the actor's time for this group alone
                actor = await self.up()
                self._under_way[actor] = self._under_way.get(actor, 0) + 1
                try:
                    timeout_s = self._longest_s + ANSWER_S
                    verdicts: list[Verdict] = await self._ask(actor, "score", timeout_s, prompt, answers)
                    return verdicts
                finally:
                    self._ended(actor)
        finally:
            self.busy -= 1

    async def up(self) -> Any:
        """The actor, started if there is none."""
        async with self._starting:
            if self._actor is None:
                o = self._options
                if o.seated is not None:
                    self.state = "waits for a node with room"
                    await o.seated(self.name)
                # Ray must not restart it: a lost actor is replaced here, where it is counted
                never = {"max_restarts": 0, "max_task_retries": 0}
                settings = {"num_cpus": 0, "max_concurrency": o.processes + 2, **o.ray(self.name), **never}
                made = ray.remote(RewardWorker).options(**settings)
                actor = self._actor = made.remote(o.jail, self._rewards, o.processes, o.limits)
                self.state = "is starting"
                try:
                    started = await self._ask(actor, "start", START_S)
                except BaseException:  # or the next caller would take it for one that has started
                    self.kill()
                    raise
                self._longest_s, self._place, self.state = started["longest_s"], started["place"], "is ready"
                self.standing = started["standing"]
            return self._actor

    def where(self) -> dict[str, Any]:
        return {} if self._place is None or self._actor is None else asdict(self._place)

    def kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor, self.state = None, "is lost"

    def close(self) -> None:
        self.kill()
        for actor in list(self._ending):
            self._end(actor)

    # --- leaving a node

    def leave(self, node: str, left_s: float | None) -> int:
        actor = self._actor
        if actor is None or self._place is None or self._place.node != node:
            return 0
        self._actor, self.state = None, "has left its node"
        self.lost_at, self._place = self._place, None  # for what becomes of its last groups; the next one is elsewhere
        loop = asyncio.get_running_loop()
        self._ending[actor] = None if left_s is None else loop.call_later(left_s, self._end, actor)
        if not self._under_way.get(actor):
            self._end(actor)
        return 1

    def _ended(self, actor: Any) -> None:
        """A call of this actor's is over; the last one of an actor that leaves ends it."""
        self._under_way[actor] -= 1
        if not self._under_way[actor]:
            del self._under_way[actor]
            self._end(actor)

    def _end(self, actor: Any) -> None:
        if actor in self._ending:
            timer = self._ending.pop(actor)
            if timer is not None:
                timer.cancel()
            ray.kill(actor)

    async def _ask(self, actor: Any, method: str, timeout_s: float, *arguments: Any) -> Any:
        """Calls the actor. WorkerLost if it died or did not answer, after which it is gone for good."""
        try:
            return await call(actor, f"{self.name}.{method}", timeout_s, method, *arguments)
        except WorkerLost:
            if self._actor is actor:
                self.lost_at, self._place = self._place, None
                self.kill()
            raise
