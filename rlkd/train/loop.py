"""The run, from a prompt to an optimizer step. Two kinds of coroutine and the buffer between them:

    produce ×N   admit a prompt → roll out → verify → guide → score → credit → buffer
    learn        take groups → pack → update → publish weights → evaluate → free slots → log → checkpoint

`learn` consumes the P oldest groups and is woken by `put`; a producer waits for a slot and is woken by `release`.

What a step did becomes true in one place (`_train`): weights, ledger, curriculum and counters move together, under the
lock `saving.idle`. Whatever ends the run, the last whole step is saved (saving.py), unless its numbers are in doubt. A
learner that dies is built again, and everything goes back to the last checkpoint with it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from rlkd.core.batch import pack
from rlkd.core.errors import (
    OK,
    RESUBMIT,
    BudgetReached,
    CheckpointError,
    ConfigError,
    DivergedError,
    InfrastructureError,
    LearnerLost,
    Stopped,
    WorkerLost,
)
from rlkd.core.ports import Algorithm, Curriculum, Learner, Services
from rlkd.core.stop import Stop
from rlkd.core.types import Group, Prompt
from rlkd.train import staleness
from rlkd.train.buffer import Buffer, Done
from rlkd.train.checkpoint import Checkpoints, State
from rlkd.train.evaluate import Evaluator
from rlkd.train.guards import Guards
from rlkd.train.health import Alarm
from rlkd.train.ledger import SKIPPED, TRAINED, Ledger, Row
from rlkd.train.no_signal import IN_A_ROW, Barren, PassRates, TurnedAway
from rlkd.train.rollout import scored, verified
from rlkd.train.saving import Saving
from rlkd.train.stages import Stages

Result = TypeVar("Result")


@dataclass(frozen=True)
class Schedule:
    """How long, how much at once, how stale."""

    steps: int = 100  # optimizer steps
    groups_per_step: int = 16  # P: prompts whose groups make one step
    staleness: int = 0  # how many steps old a group may be when used; 0 is synchronous
    max_turned_away: int = 10  # × P groups in a row turned away, or trained without any signal, before one of these:
    # the run ends, or goes on with the groups it has; None: it ends if they were turned away, and goes on if trained
    on_no_signal: Literal["stop", "skip_step"] | None = None
    max_retries: int = 3  # of one prompt, after a worker was lost
    stall_s: float = 120.0  # say what is awaited when it takes longer than this


@runtime_checkable
class Reporter(Protocol):
    """What the loop tells of itself."""

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None: ...
    def step(
        self, step: int, groups: Sequence[Group], metrics: Mapping[str, float], timings: Mapping[str, float]
    ) -> None: ...
    def resolved(self, step: int, rows: Sequence[Row]) -> None: ...
    def event(self, kind: str, text: str, **fields: Any) -> None: ...


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
    guards: Guards = field(default_factory=Guards)
    stop: Stop = field(default_factory=Stop)  # asked: save and stop as soon as that is safe
    resume: int | None = None  # go on from this step's checkpoint; None: the newest
    max_restarts: int = 3  # of the learner, without a new checkpoint in between
    max_failed_saves: int = 2  # in a row
    margin_s: float = 5.0  # a save must be expected to end so long before a deadline
    deterministic: bool = False  # a prompt that is asked again keeps its seed

    async def run(self) -> int:
        """Run to the last step; the exit code. Raises Stopped when asked to stop; other errors as they come."""
        fresh = self.curriculum.state_dict()
        self.step, self.whole, self.held_s = 0, False, 0.0
        self.last: Mapping[str, float] = {}
        self.buffer = Buffer(self._slots, self.curriculum, Ledger())
        self.restarts, self.saves = 0, 0  # of the learner; saves when it was lost last
        self.saving = Saving(
            self.checkpoints, self.learner, self.curriculum, self.stages, self.report, self.stop, self._state,
            lambda: self.whole, self._score, self.schedule.steps, self.schedule.stall_s, self.margin_s,
            self.max_failed_saves,
        )  # fmt: skip
        lost: LearnerLost | None = None
        while True:
            try:
                if lost is not None:
                    await self._race(self._rebuild(lost))
                await self._race(self._begin(fresh))
                await self._race(self.learn(), *(self.produce() for _ in range(self._slots)))
                return OK
            except LearnerLost as error:
                lost = error

    async def _begin(self, fresh: Mapping[str, Any]) -> None:
        """From the newest checkpoint, or from the start: state of the driver, of the learner and of the samplers."""
        self.curriculum.load_state_dict(dict(fresh))
        self.step, self.whole = 0, False
        with self.stages.stage("restore"):
            state = await self.checkpoints.restore(self.learner, self.curriculum, self._prompt, self.resume)
        self.resume = None  # a learner that is lost later goes back to the newest
        self.step, self.last = state.step, state.last
        self.buffer = Buffer(self._slots, self.curriculum, state.ledger)
        most, said = self._most_away, self.schedule.on_no_signal
        self.turned_away = TurnedAway(most, PassRates(self.success), said != "skip_step")
        self.barren = Barren(most, PassRates(self.success), said == "stop", int(state.last.get(IN_A_ROW, 0)))
        self.guards.begin(self.step)
        self.knobs = self.algorithm.knobs(self.step, self.last)
        self.whole = True
        with self.stages.stage("sync"):
            await self.learner.publish(self.step)
        if self.step == 0 and 0 not in self.evaluator.results:
            await self.evaluator.at_start(self.services)

    @property
    def _slots(self) -> int:
        """Groups under way at once: as many as the next steps will use, and none for steps after the last."""
        steps = min(self.schedule.staleness + 1, self.schedule.steps - self.step)
        return steps * self.schedule.groups_per_step

    @property
    def _most_away(self) -> int:
        return self.schedule.max_turned_away * self.schedule.groups_per_step

    def _prompt(self, prompt_id: str, seed: int) -> Prompt:
        return replace(self.prompts[prompt_id], seed=seed)

    async def _race(self, *work: Coroutine[Any, Any, None]) -> None:
        """Until the first of these ends, somebody asks to stop, or an error: then the last whole step is saved."""
        tasks = [
            *(asyncio.create_task(w) for w in work),
            asyncio.create_task(self.stop.wait(), name="stop"),
            asyncio.create_task(self._watch(), name="watchdog"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if errors := [e for task in done if (e := task.exception()) is not None]:  # and an error ends the run
                error = min(errors, key=lambda e: isinstance(e, BudgetReached))  # whatever else is wrong comes first
                if not isinstance(error, DivergedError | CheckpointError | LearnerLost):
                    await self.saving.before(error)
                raise error
            if not tasks[0].done():
                raise Stopped(RESUBMIT, await self.saving.in_time(tasks[0]))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- producers

    async def produce(self) -> None:
        while True:
            ticket, prompt = await self.buffer.admit()
            judged = await self._group(ticket, prompt)
            credited = self.algorithm.credit(judged)
            why = None if credited.samples else self._reason(judged)
            self.turned_away.rates.add(judged)
            if why is not None:
                self.turned_away.add(why)
            await self.buffer.put(ticket, Done(judged, credited if why is None else None, why))

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

        drawn = await stage(
            "rollout", lambda attempt: algorithm.rollout(self._reseeded(prompt, attempt), ask, self.knobs)
        )
        judged, unjudged = await stage("verify", lambda _: verified(drawn, ask))
        if unjudged:
            self.report.event("unjudged", f"{unjudged} samples could not be judged", prompt=prompt.id, samples=unjudged)
        guided = await stage("guide", lambda _: algorithm.guidance(judged, ask, self.knobs))
        group = await stage("score", lambda _: scored(guided, ask, algorithm))
        self.report.observe(group, seconds.taken())
        return group

    def _reseeded(self, prompt: Prompt, attempt: int) -> Prompt:
        """What killed its worker may kill the next one with the same seed."""
        return prompt if self.deterministic else replace(prompt, seed=(prompt.seed + attempt) % 2**63)

    def _reason(self, group: Group) -> str:
        if not group.samples:
            return "no samples"
        right = [s.reward > self.success for s in group.samples]
        return "all right" if all(right) else "all wrong" if not any(right) else "other"

    # --- the learner

    async def learn(self) -> None:
        while self.step < self.schedule.steps:
            taken = await self.buffer.take(self.schedule.groups_per_step, self._most_away, self._renewed)
            wanted = [d.credited for d in taken.values() if d.credited is not None]
            if len(wanted) < self.schedule.groups_per_step:
                self.report.event("no_signal", self.turned_away.of_step(len(wanted)), step=self.step + 1)
            groups = list(self.algorithm.credit_step(wanted)) if wanted else []
            alarms, more = await self._train(taken, groups), staleness.metrics(groups, self.step)
            try:
                with self.stages.stage("sync", f"version {self.step}"):  # a stop need not wait for the samplers
                    await self.learner.publish(self.step)
                    more |= await self.guards.after_sync(self.step)
                with self.stages.stage("evaluate", f"step {self.step}"):
                    await self.evaluator.if_due(self.step, self.schedule.steps, self.services)
                if self.step + self.schedule.staleness < self.schedule.steps:
                    await self.buffer.release(len(wanted))
            finally:  # the step is made, and will be saved, also if the run ends here
                more |= self.guards.row()
                self.report.step(self.step, groups, {**self.last, **more}, self.stages.taken())
            for alarm in alarms:
                self.report.event(alarm.kind, alarm.text, step=self.step)
            if text := self.barren.told():
                self.report.event("no_signal", text, step=self.step)
            self.checkpoints.store.news()
            if self.checkpoints.due(self.step, self.schedule.steps):
                async with self.saving.idle:
                    await self.saving.save(must=self.step == self.schedule.steps)

    async def _train(self, taken: Mapping[int, Done], groups: Sequence[Group]) -> list[Alarm]:
        """One optimizer step, and everything that becomes true with it: nothing is saved before that is so. What its
        numbers say of the run's health. DivergedError if they are in doubt. Without groups the weights stay."""
        tickets = [ticket for ticket, done in taken.items() if done.credited is not None]
        if len(groups) != len(tickets):
            raise ConfigError(
                "RLKD-C170", f"credit_step gave back {len(groups)} groups for {len(tickets)}",
                where="algorithm", fix="leave groups out in `credit`, one by one",
            )  # fmt: skip
        staleness.refuse(groups, self.step, self.schedule.staleness)
        batch = pack(groups, self.learner.ranks, self.max_tokens, self.algorithm.whole_groups) if groups else []
        async with self.saving.idle:
            began, self.whole = time.monotonic(), False
            with self.stages.stage("learn", f"step {self.step}"):
                metrics = await self.learner.update(batch, self.knobs) if groups else {}
            self.step += 1
            moved = not metrics.get("nonfinite")
            trained = {t: len(g.samples) for t, g in zip(tickets, groups, strict=True)} if moved else {}
            rows = []
            for ticket, done in taken.items():
                asked = self.buffer.ledger.pending[ticket]  # as it was drawn; an answer may have another seed
                what = done.why or (TRAINED if moved else SKIPPED)
                rows.append(Row(ticket, asked.id, asked.seed, what, trained.get(ticket, 0)))
            self.buffer.ledger.resolve(self.step, rows)
            for done in taken.values():
                self.curriculum.observe(done.judged)
            away = Counter(f"turned_away/{done.why}" for done in taken.values() if done.why is not None)
            self.turned_away.clear()
            barren = self.barren.step(groups)
            self.last = {**self.knobs, **metrics, **{name: float(n) for name, n in away.items()}, **barren}
            self.knobs = self.algorithm.knobs(self.step, self.last)  # before a producer begins the next step's groups
            self.report.resolved(self.step, rows)
            alarms = self.guards.after_step(self.step, groups, self.last)
            self.whole, self.held_s = True, max(self.held_s, time.monotonic() - began)
        return alarms

    def _renewed(self, group: Group) -> bool:
        """Whether its prompt is asked again: steps of few groups, which skip_step allows, let others get too old."""
        may = self.schedule.on_no_signal == "skip_step"
        return may and staleness.too_old(group, self.step, self.schedule.staleness)

    async def _rebuild(self, lost: LearnerLost) -> None:
        """New learner ranks, unless that was done too often since the last checkpoint."""
        self.whole = False
        if self.stop.is_set():
            raise Stopped(
                RESUBMIT, f"the learner was lost while the run was ending ({lost}); {self.saving.stands()}"
            ) from lost
        self.restarts = self.restarts + 1 if self.saving.done == self.saves else 1
        self.saves = self.saving.done
        text = f"{lost}: back to step {self.checkpoints.step or 0} (restart {self.restarts} of {self.max_restarts})"
        self.report.event("learner_lost", text, step=self.step, restart=self.restarts)
        if self.restarts > self.max_restarts:
            raise InfrastructureError(
                "RLKD-I004",
                f"the learner was lost {self.restarts} times without a new checkpoint in between; the last: {lost}",
                where="learner.max_restarts",
                fix="the same command continues from the last checkpoint; Ray's logs say why the process ended",
            ) from lost
        with self.stages.stage("rebuild"):
            await asyncio.sleep(self.guards.settles_in_s())
            await self.learner.rebuild()

    def _state(self) -> State:
        return State(self.step, self.last, self.buffer.ledger)

    def _score(self, step: int) -> float | None:
        result = self.evaluator.results.get(step)
        return result.estimates[0].value if result is not None and result.estimates else None

    async def _watch(self) -> None:
        await self.stages.watch(self.schedule.stall_s, self._late, self.guards.stalled, self.guards.counters)

    def _late(self, text: str) -> None:
        self.report.event("waiting", text)
