"""Rewards on Ray: actors that each hold a jail, and the driver's side of them, which is the port `Verify`."""

import asyncio
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from jaxtyping import Int32

from rlkd.core.errors import WorkerLost
from rlkd.core.types import Answer, Origin, Prompt, Sample
from rlkd.core.verdict import Verdict
from rlkd.workers.ask import call
from rlkd.workers.tally import Mixer, OnError, Tally

ATTEMPTS = 3  # workers a group may lose; judging is pure, so it can be asked for again
ANSWER_S = 30.0  # for a worker to answer beyond what judging takes
START_S = 180.0  # for an actor to come up and load the rewards


class RewardWorker:
    """The actor: a jail, and as many threads as it has children to wait for them."""

    def __init__(self, jail: str, rewards: bytes, processes: int, timeout_s: float, memory_gib: float) -> None:
        module, _, name = jail.partition(":")
        self._jail = getattr(importlib.import_module(module), name)(rewards, processes, timeout_s, memory_gib)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="jail")

    async def start(self) -> dict[str, Any]:
        """Loads the rewards. Their names, the most seconds a group can take, and what starting took."""
        began = time.monotonic()
        names = await asyncio.get_running_loop().run_in_executor(self._threads, self._jail.start)
        return {"names": names, "longest_s": self._jail.longest_s, "seconds": time.monotonic() - began}

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
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
    jail: str = "rlkd.engines.jail:Jail"
    ray: Callable[[str], Mapping[str, Any]] = lambda name: {}  # noqa: ARG005 – options of the actor of that name: its place


class RewardPool:
    """Scores groups on `workers` actors: the port `Verify`. All of it runs on the driver's event loop.

    `rewards` come from rlkd.rewards.table.pack, `mix` from rlkd.rewards.mix.Mix.of; `text_of` decodes the tokens after
    the prompt, without special tokens. A lost worker is replaced and its group judged again; WorkerLost if that fails
    ATTEMPTS times. DataError as Tally says.
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
    ) -> None:
        self._text_of = text_of
        self._tally = Tally(mix, on_error, max_error_fraction)
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

    def close(self) -> None:
        """Ends the actors, and with them their children."""
        for worker in self._workers:
            worker.kill()

    def _answer(self, sample: Sample) -> Answer:
        written = sample.tokens[sample.origin != Origin.PROMPT]
        return Answer(self._text_of(written), sample.finish, len(written))

    async def _verdicts(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        prompt = replace(prompt, demonstrations=())  # worked answers may be long, and no verifier looks at them
        for attempt in range(ATTEMPTS):
            worker = min(self._workers, key=lambda w: w.busy)
            try:
                return await worker.score(prompt, answers)
            except WorkerLost as e:
                self._tally.count("workers_lost")
                if attempt == ATTEMPTS - 1:
                    raise WorkerLost(f"{e} (attempt {ATTEMPTS} to judge prompt {prompt.id!r})") from e
        raise AssertionError("not reached")


class _Worker:
    """The driver's handle of one actor: at most `processes` groups at once, a new actor when it is lost."""

    def __init__(self, name: str, rewards: bytes, options: WorkerOptions) -> None:
        self.name, self.busy = name, 0
        self._rewards, self._options = rewards, options
        self._actor: Any = None
        self._longest_s = 0.0
        self._starting = asyncio.Lock()
        self._free = asyncio.Semaphore(options.processes)

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[Verdict]:
        self.busy += 1
        try:
            async with self._free:  # waiting here, not in the actor, keeps the actor's time for this group alone
                actor = await self.up()
                timeout_s = self._longest_s + ANSWER_S
                verdicts: list[Verdict] = await self._ask(actor, "score", timeout_s, prompt, answers)
                return verdicts
        finally:
            self.busy -= 1

    async def up(self) -> Any:
        """The actor, started if there is none."""
        async with self._starting:
            if self._actor is None:
                o = self._options
                # Ray must not restart it: a lost actor is replaced here, where it is counted
                never = {"max_restarts": 0, "max_task_retries": 0}
                settings = {"num_cpus": 0, "max_concurrency": o.processes + 2, **o.ray(self.name), **never}
                made = ray.remote(RewardWorker).options(**settings)
                actor = self._actor = made.remote(o.jail, self._rewards, o.processes, o.timeout_s, o.memory_gib)
                try:
                    started = await self._ask(actor, "start", START_S)
                except BaseException:  # or the next caller would take it for one that has started
                    self.kill()
                    raise
                self._longest_s = started["longest_s"]
            return self._actor

    def kill(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    async def _ask(self, actor: Any, method: str, timeout_s: float, *arguments: Any) -> Any:
        """Calls the actor. WorkerLost if it died or did not answer, after which it is gone for good."""
        try:
            return await call(actor, f"{self.name}.{method}", timeout_s, method, *arguments)
        except WorkerLost:
            if self._actor is actor:
                self.kill()
            raise
