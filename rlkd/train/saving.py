"""Saving the last whole step: when a save is due, before an error ends the run, and in time for a deadline."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rlkd.core.errors import PreflightError, SaveFailed
from rlkd.core.interval import FIRST_SAVE_S
from rlkd.core.ports import Curriculum, Learner
from rlkd.core.stop import Stop
from rlkd.train.checkpoint import Checkpoints, State
from rlkd.train.stages import Stages

AGAIN_S = 2.0  # between two tries of a save that must not fail


@runtime_checkable
class Events(Protocol):
    def event(self, kind: str, text: str, **fields: Any) -> None: ...


@dataclass
class Saving:
    """`state()` is the driver's part of a checkpoint, of the last whole step if `whole()`: it is not while a step is
    made, and while everything goes back to a checkpoint."""

    checkpoints: Checkpoints
    learner: Learner
    curriculum: Curriculum
    stages: Stages
    report: Events
    stop: Stop
    state: Callable[[], State]
    whole: Callable[[], bool]
    score: Callable[[int], float | None]  # of a step, if it was evaluated
    steps: int  # of the whole run
    patience_s: float  # for a save before an error ends the run, beside what it is expected to take
    margin_s: float = 5.0  # a save must be expected to end so long before a deadline
    max_failed: int = 2  # in a row
    idle: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while learner and driver do not fit together
    done: int = 0  # saves
    failed: int = 0  # in a row

    async def save(self, must: bool = False) -> None:
        """Commit the last whole step. A save that fails is told, and the run goes on; too many in a row end it. With
        `must` nothing comes after it: it is tried again until then. The caller holds `idle`."""
        state = self.state()
        while True:
            began = time.monotonic()
            try:
                with self.stages.stage("save", f"step {state.step}"):
                    path = await self.checkpoints.save(state, self.learner, self.curriculum, self.score(state.step))
                break
            except (OSError, SaveFailed) as error:
                self._not_saved(state.step, error)
            if not must:
                return
            await asyncio.sleep(AGAIN_S)
        self.failed, self.done = 0, self.done + 1
        if path is not None:
            took = time.monotonic() - began
            self.report.event("checkpoint", f"saved step {state.step}", path=str(path), step=state.step, seconds=took)

    async def before(self, error: BaseException) -> None:
        """The run ends with this error; what it learned until then shall not be lost, if that can be."""

        async def save() -> None:
            async with self.idle:
                if self._unsaved():
                    await self.save(must=True)

        step = self.state().step
        if not step and not self.whole():
            return
        try:
            async with asyncio.timeout(self._takes() * 10 + self.patience_s):
                await save()
        except Exception as second:
            text = f"step {step} could not be saved before the run ended: {second!r}; {self.stands()}"
            self.report.event("save_failed", text, step=step)

    async def in_time(self, work: "asyncio.Task[Any]") -> str:
        """Asked to stop: save, if that can be done before the deadline; what to tell the user. Rollouts under way are
        not waited for: their prompts stay owed."""
        request, left = self.stop.request, self.stop.left_s()
        reason, again = f"{request.text}: " if request is not None else "", "the same command continues there"
        if not self.state().step:
            return f"{reason}nothing was trained in this attempt, and {self.stands()}; the same command goes on"
        try:
            if left is not None and left <= self._takes() and self._unsaved():  # a free lock would be had all the same
                raise TimeoutError
            async with asyncio.timeout(None if left is None else left - self._takes()):
                await self.idle.acquire()
        except TimeoutError:
            return f"{reason}no time to save within {left:.0f} s; {self.stands()}; {again}"
        if work.done() and (error := work.exception()) is not None:
            raise error
        if not self._unsaved():
            return f"{reason}{self.stands()}; {again}"
        step, left = self.state().step, self.stop.left_s()  # others may have asked meanwhile, for sooner
        try:
            async with asyncio.timeout(None if left is None else max(0.0, left - self.margin_s / 2)):
                await self.save(must=True)
        except (TimeoutError, SaveFailed, PreflightError) as failed:
            return f"{reason}step {step} could not be saved ({failed or 'no time'}); {self.stands()}; {again}"
        return f"{reason}saved step {step} of {self.steps}; {again}"

    def stands(self) -> str:
        """In words: what there is to go on from."""
        there = self.checkpoints.step
        if there is None:
            there = max(self.checkpoints.store.there(), default=None)
        return "nothing was saved yet" if there is None else f"the checkpoint of step {there} stands"

    def _unsaved(self) -> bool:
        """Whether there is a whole step that no checkpoint has."""
        step = self.state().step
        return self.whole() and step > 0 and step != self.checkpoints.step

    def _takes(self) -> float:
        return (self.checkpoints.save_s or FIRST_SAVE_S) + self.margin_s

    def _not_saved(self, step: int, error: OSError | SaveFailed) -> None:
        self.failed += 1
        self.report.event("save_failed", f"step {step} could not be saved ({error}); {self.stands()}", step=step)
        if self.failed >= self.max_failed:
            raise PreflightError(
                "RLKD-E170", f"{self.failed} saves in a row failed; the last one: {error}", where="checkpoint",
                fix="make room on the disk; the same command continues from the last checkpoint",
            ) from error  # fmt: skip
