"""The run, from a prompt to an optimizer step. Two kinds of coroutine and the buffer between them:

    produce ×N   admit a prompt → roll out → verify → guide → score → credit → buffer
    learn        take groups → pack → update → publish weights → evaluate → free slots → log → checkpoint

`learn` consumes the P oldest groups and is woken by `put`; a producer waits for a slot and is woken by `release`.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from rlkd.core.batch import pack
from rlkd.core.errors import OK, RESUBMIT, BudgetReached, DataError, InfrastructureError, Stopped, WorkerLost
from rlkd.core.ports import Algorithm, Curriculum, Learner, Services
from rlkd.core.types import Group, Origin, Prompt
from rlkd.train.buffer import Buffer
from rlkd.train.checkpoint import Checkpoints, State
from rlkd.train.evaluate import Evaluator
from rlkd.train.rollout import scored, verified
from rlkd.train.stages import Stages

Result = TypeVar("Result")


@dataclass(frozen=True)
class Schedule:
    """How long, how much at once, how stale."""

    steps: int = 100  # optimizer steps
    groups_per_step: int = 16  # P: prompts whose groups make one step
    staleness: int = 0  # how many steps old a group may be when used; 0 is synchronous
    max_turned_away: int = 10  # × P groups turned away in a row (no signal) before the run stops
    max_retries: int = 3  # of one prompt, after a worker was lost
    stall_s: float = 120.0  # say what is awaited when it takes longer than this


@runtime_checkable
class Reporter(Protocol):
    """What the loop tells of itself."""

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None: ...
    def step(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> None: ...
    def event(self, kind: str, text: str, **fields: Any) -> None: ...


@dataclass
class TurnedAway:
    """Groups that were not trained since the last step, by reason."""

    bound: int
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        total = sum(self.reasons.values())
        if total > self.bound:
            shares = ", ".join(f"{n / total:.0%} {why}" for why, n in sorted(self.reasons.items()))
            raise DataError(
                "RLKD-D020",
                f"no learning signal: {total} groups in a row were turned away ({shares})",
                where="schedule.max_turned_away",
                fix="take easier or harder prompts, or more samples a prompt (algorithm.rollout.samples)",
            )

    def clear(self) -> dict[str, float]:
        counts = {f"turned_away/{why}": float(n) for why, n in self.reasons.items()}
        self.reasons.clear()
        return counts


@dataclass
class Loop:
    schedule: Schedule
    algorithm: Algorithm
    curriculum: Curriculum
    prompts: Mapping[str, Prompt]  # by id, for what an earlier attempt still owes
    services: Services
    learner: Learner
    checkpoints: Checkpoints
    evaluator: Evaluator
    report: Reporter
    max_tokens: int = 4096  # of one micro-batch
    success: float = 0.5  # a reward above this counts as right, when turned-away groups are sorted by reason
    stages: Stages = field(default_factory=Stages)
    stop: asyncio.Event = field(default_factory=asyncio.Event)  # set: save and stop as soon as that is safe

    async def run(self) -> int:
        """Run to the last step; the exit code. Raises Stopped when asked to stop; other errors as they come."""
        state = await self.checkpoints.restore(self.learner, self.curriculum)
        self.step, self.last = state.step, state.last
        owed = {t: replace(self.prompts[i], seed=seed) for t, i, seed in state.owed}
        slots = (self.schedule.staleness + 1) * self.schedule.groups_per_step
        self.buffer = Buffer(slots, self.curriculum, owed, state.next_ticket)
        self.turned_away = TurnedAway(self.schedule.max_turned_away * self.schedule.groups_per_step)
        self.knobs = self.algorithm.knobs(self.step, self.last)
        self.idle = asyncio.Lock()  # held while the learner's weights and the counters do not fit together
        with self.stages.stage("sync"):
            await self.learner.publish(self.step)
        if self.step == 0:
            await self.evaluator.at_start(self.services)
        tasks = [
            asyncio.create_task(self.learn(), name="learn"),
            asyncio.create_task(self.stop.wait(), name="stop"),
            asyncio.create_task(self.stages.watch(self.schedule.stall_s, self._late), name="watchdog"),
            *(asyncio.create_task(self.produce(), name=f"produce {i}") for i in range(slots)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if errors := [e for task in done if (e := task.exception()) is not None]:  # and an error ends the run
                error = min(errors, key=lambda e: isinstance(e, BudgetReached))  # whatever else is wrong comes first
                if isinstance(error, BudgetReached):
                    await self._save_and_end(tasks)
                raise error
            if self.stop.is_set() and self.step < self.schedule.steps:
                await self._save_and_end(tasks)
                what = f"saved step {self.step} of {self.schedule.steps}; the same command continues there"
                raise Stopped(RESUBMIT, what)
            return OK
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def produce(self) -> None:
        while True:
            ticket, prompt = await self.buffer.admit()
            group = await self._group(ticket, prompt)
            wanted, credited = self.curriculum.observe(group), self.algorithm.credit(group)
            if wanted and credited.samples:
                await self.buffer.put(ticket, credited)
            else:
                self.turned_away.add(self._reason(group, wanted))
                self.buffer.spend([ticket])
                await self.buffer.release(1)

    async def _group(self, ticket: int, prompt: Prompt) -> Group:
        """From a prompt to scored samples. A stage that loses a worker is asked again alone: what is written stays."""
        ask, algorithm, seconds = self.services, self.algorithm, Stages()

        async def stage(name: str, call: Callable[[int], Awaitable[Result]]) -> Result:
            for attempt in range(self.schedule.max_retries + 1):
                try:
                    with self.stages.stage(name, prompt.id), seconds.stage(name):
                        return await call(attempt)
                except WorkerLost as lost:
                    about = {"ticket": ticket, "prompt": prompt.id, "stage": name, "attempt": attempt}
                    self.report.event("worker_lost", str(lost), **about)
            raise InfrastructureError(
                "RLKD-I002",
                f"prompt {prompt.id} lost its worker {self.schedule.max_retries + 1} times in stage `{name}`",
                where="schedule.max_retries",
                fix="see events.jsonl for what happened to the workers",
            )

        drawn = await stage("rollout", lambda attempt: algorithm.rollout(_reseeded(prompt, attempt), ask, self.knobs))
        judged, unjudged = await stage("verify", lambda _: verified(drawn, ask))
        if unjudged:
            self.report.event("unjudged", f"{unjudged} samples could not be judged", prompt=prompt.id, samples=unjudged)
        guided = await stage("guide", lambda _: algorithm.guidance(judged, ask, self.knobs))
        group = await stage("score", lambda _: scored(guided, ask, algorithm))
        self.report.observe(group, seconds.taken())
        return group

    def _reason(self, group: Group, wanted: bool) -> str:
        if not wanted:
            return "curriculum"
        if not group.samples:
            return "no samples"
        right = [s.reward > self.success for s in group.samples]
        return "all right" if all(right) else "all wrong" if not any(right) else "other"

    async def learn(self) -> None:
        while self.step < self.schedule.steps:
            taken = await self.buffer.take(self.schedule.groups_per_step)
            groups = list(self.algorithm.credit_step(list(taken.values())))
            batch = pack(groups, self.learner.ranks, self.max_tokens, self.algorithm.whole_groups)
            async with self.idle:
                with self.stages.stage("learn", f"step {self.step}"):
                    metrics = await self.learner.update(batch, self.knobs)
                self.step += 1
                self.buffer.spend(taken)
                self.last = {**self.knobs, **metrics, **self.turned_away.clear()}
                self.knobs = self.algorithm.knobs(
                    self.step, self.last
                )  # before a producer begins the next step's groups
                with self.stages.stage("sync", f"version {self.step}"):
                    await self.learner.publish(self.step)
            with self.stages.stage("evaluate", f"step {self.step}"):
                await self.evaluator.if_due(self.step, self.schedule.steps, self.services)
            await self.buffer.release(len(taken))
            self.report.step(self.step, groups, {**self.last, **self._staleness(groups)}, self.stages.taken())
            if self.checkpoints.due(self.step, self.schedule.steps):
                async with self.idle:
                    await self._save()

    def _staleness(self, groups: Sequence[Group]) -> dict[str, float]:
        """Of what the policy wrote; NaN for a step of demonstrations."""
        written = [s for g in groups for s in g.samples if (s.origin == Origin.POLICY).any()]
        ages: list[float] = [self.step - 1 - s.versions[0] for s in written] or [math.nan]
        return {"staleness/mean": sum(ages) / len(ages), "staleness/max": float(max(ages))}

    async def _save(self) -> None:
        owed = [(ticket, p.id, p.seed) for ticket, p in sorted(self.buffer.owed.items())]
        state = State(self.step, self.last, owed, self.buffer.next_ticket)
        with self.stages.stage("save", f"step {self.step}"):
            path = await self.checkpoints.save(state, self.learner, self.curriculum)
        self.report.event("checkpoint", f"saved step {self.step}", path=path, step=self.step)

    async def _save_and_end(self, tasks: Sequence["asyncio.Task[Any]"]) -> None:
        """Save from the last whole step, without waiting for rollouts under way; their prompts stay owed."""
        async with self.idle:
            for task in tasks:
                task.cancel()
            await self._save()

    def _late(self, text: str) -> None:
        self.report.event("waiting", text)


def _reseeded(prompt: Prompt, attempt: int) -> Prompt:
    return replace(prompt, seed=(prompt.seed + attempt) % 2**63)
