"""Places for workers, and what becomes of a place whose worker is lost. `Crew` fills them."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from rlkd.core.errors import InfrastructureError, WorkerLost
from rlkd.workers.ask import Slot
from rlkd.workers.limits import End, PoolOptions
from rlkd.workers.losses import Kind, kind_of
from rlkd.workers.vitals import kernel_kills

log = logging.getLogger("rlkd.workers")


class Places(ABC):
    """Slots for workers, the tasks that look after them, and why there are none any more if so."""

    def __init__(
        self,
        name: str,
        size: int,
        options: PoolOptions,
        kill: Callable[[Any], None],
        tell: Callable[[str, str], None],
        was_draining: Callable[[str], bool],
    ) -> None:
        self._name, self._size, self._options = name, size, options
        self._kill, self._tell, self._was_draining = kill, tell, was_draining
        self._slots: list[Slot] = []
        self._leaving: list[Slot] = []
        self._end: End | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._counts = {"lost": 0, "preempted": 0, "replaced": 0}
        self._kernel_kills = kernel_kills()

    @abstractmethod
    async def _bring_up(self, slot: Slot) -> None:
        """Make workers for a slot until one has what it needs."""

    # --- losing

    def _check(self) -> None:
        if self._end is not None:
            raise self._end.error(self._end.code, self._end.text, where=self._name, fix=self._end.fix)

    def _lose(self, slot: Slot, handle: Any, lost: WorkerLost) -> None:
        """A worker is lost: no more work for it, its callers are told, another one is made. Once per worker."""
        if handle is None or slot.handle is not handle:
            return
        self._discard(slot, lost)
        if slot.leaving:
            return
        self._charge(slot, lost)
        if self._end is None and slot.out is None:
            self._background(self._bring_up(slot), f"replace {slot.name}")
        else:
            self._background(self._notify(), f"end of {slot.name}")

    def _discard(self, slot: Slot, lost: WorkerLost) -> None:
        handle, slot.handle, slot.ready = slot.handle, None, False
        slot.state = "is lost"
        if not slot.lost.done():
            slot.lost.set_exception(WorkerLost(str(lost)))
            slot.lost.exception()  # it is looked at by those who wait, if any do
        if handle is not None:
            self._kill(handle)

    def _charge(self, slot: Slot, lost: WorkerLost) -> None:
        kind = kind_of(lost, slot.place is not None and self._was_draining(slot.place.node), self._memory_full(slot))
        self._counts["lost"] += 1
        self._counts["preempted"] += kind is Kind.PREEMPT
        verdict = slot.losses.charge(kind, time.monotonic())
        why = f"{lost}" + ("" if slot.vitals is None or kind is not Kind.MEMORY else f" ({slot.vitals.memory})")
        log.warning("lost %s (%s, %d in a row): %s", slot.name, kind, slot.losses.in_a_row, why)
        if slot.losses.out_of_memory:
            self._finish_all(
                End(
                    f"{slot.name} ran out of memory twice in a row; the last time: {why}",
                    "RLKD-I612",
                    f"{self._options.advice.memory}, or take a machine with more memory",
                )
            )
        elif verdict is not None:
            self._take_out(slot, verdict, why)

    def _take_out(self, slot: Slot, verdict: str, why: str) -> None:
        slot.out = f"is out: {verdict}"
        slot.state = f"{slot.out}; the last time: {why}"
        left = sum(s.out is None for s in self._slots)
        if not left:
            advice = self._options.advice
            fix = f"the workers' logs (ray logs) say why: out of memory ({advice.memory}), or too slow ({advice.slow})"
            self._finish_all(End(f"{slot.name} was {verdict}; the last time: {why}", fix=fix))
        else:
            text = f"{slot.name} was {verdict} and is not replaced any more; {left} of {self._size} go on: {why}"
            self._tell("quarantine", text)

    def _memory_full(self, slot: Slot) -> bool:
        """Whether the kernel has killed for memory since the last loss, or there was next to none left."""
        before, self._kernel_kills = self._kernel_kills, kernel_kills()
        killed = before is not None and self._kernel_kills is not None and self._kernel_kills > before
        return killed or (slot.vitals is not None and slot.vitals.memory.nearly_full)

    def _finish_all(self, end: End) -> None:
        self._end = self._end or end

    # --- tasks

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until_ended(self, work: "asyncio.Future[Any]") -> None:
        """Wait for it, or until nothing more comes from this crew."""

        async def ended() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._end is not None)

        end = asyncio.create_task(ended(), name=f"end of {self._name}")
        try:
            await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            end.cancel()

    def _background(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        """An error in a background task (a bug, or a worker's RlkdError at start) must reach whoever calls next."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end = End(f"{task.get_name()} failed: {error}", error=InfrastructureError)
            self._background(self._notify(), f"end of {self._name}")
