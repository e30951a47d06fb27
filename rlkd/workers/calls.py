"""Calls on a crew's workers: who gets one, what becomes of it, and a second worker for one that is late (hedge.py)."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from rlkd.core.errors import WorkerLost
from rlkd.workers.ask import Slot, ask
from rlkd.workers.crew import Crew
from rlkd.workers.hedge import Pace, Try, winner

LOOK_S = 1.0  # between two looks at a worker that was overtaken
SIGN_S = 30.0  # for a sign of life of it


class Calls(Crew):
    """A crew that is given work. A call ends with an answer, an error of the worker's own code, or WorkerLost."""

    def __init__(self, *of_crew: Any) -> None:
        super().__init__(*of_crew)
        o = self._options
        self._pace = None if o.hedge is None else Pace(o.hedge, o.hedge_floor_s)
        self._hedged = {"workers/hedged": 0, "workers/hedged_won": 0}  # calls asked twice; won by the second
        self._told_late: set[tuple[str, int]] = set()  # workers whose late calls were told

    async def _call(self, load: int, what: str, method: str, *arguments: Any) -> Any:
        """One call on the worker with the least to do."""
        slot = await self._take(load)
        return await self._on(slot, slot.handle, load, what, method, *arguments)

    async def _on(self, slot: Slot, handle: Any, load: int, what: str, method: str, *arguments: Any) -> Any:
        """One call on a worker that was taken for it."""
        try:
            return await self._guarded(slot, handle, what, method, *arguments)
        finally:
            slot.load -= load
            slot.calls -= 1
            await self._notify()

    async def _take(self, load: int) -> Slot:
        """The ready worker with the least to do; waits while all have all they may have, and, if the pool is patient,
        while all are being replaced."""
        patient = self._options.patient
        if not self._slots:
            raise RuntimeError(f"{self._name}: the pool was not started")
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._end is not None or self._free() or not (patient or any(s.ready for s in self._slots))
            )
        self._check()
        if not (free := self._free()):
            raise WorkerLost(f"{self._name}: " + ", ".join(f"{s.name} {s.state}" for s in self._slots))
        return _taken(min(free, key=_to_do), load)

    def _free(self) -> list[Slot]:
        """Who may be given a call."""
        most = self._options.at_once
        return [s for s in self._slots if s.ready and (most is None or s.calls < most)]

    async def _guarded(self, slot: Slot, handle: Any, what: str, method: str, *arguments: Any) -> Any:
        """`ask`, and if the worker turns out to be lost, its replacement."""
        try:
            answer = await ask(slot, handle, what, self._options.timeout_s, method, *arguments)
        except WorkerLost as error:
            self._lose(slot, handle, error)
            self._check()
            raise
        slot.losses.answered()
        return answer

    # --- late calls

    async def _in_time(
        self,
        max_tokens: int,
        same: Callable[[], bool],
        usable: Callable[[Any], bool],
        load: int,
        what: str,
        method: str,
        *arguments: Any,
    ) -> Any:
        """`_call`, and when it is late the same of a second worker, if it still would be the `same`: the first answer
        is taken. One of the second that is not `usable` is not."""
        if self._pace is None:
            return await self._call(load, what, method, *arguments)

        def asked(slot: Slot) -> Try:
            work = self._on(slot, slot.handle, load, what, method, *arguments)
            call = asyncio.create_task(work, name=f"{slot.name}.{what}")
            call.add_done_callback(lambda over: over.cancelled() or over.exception())  # asyncio prints unseen errors
            return Try(slot, slot.handle, time.monotonic(), call)

        async def again() -> Try | None:
            other = await self._spare(first.slot, load, same)
            if other is None:
                return None
            self._tell_late(first, other, what)
            return asked(other)

        first = asked(await self._take(load))
        won, other = await winner(first, self._pace.late_s(max_tokens), again, usable)
        self._hedged["workers/hedged_won"] += won is not first
        if other is not None:
            self._background(self._overtaken(other), f"end of {what} on {other.slot.name}")
        answer = won.answer.result()
        self._pace.took(max_tokens, time.monotonic() - won.began)
        return answer

    async def _spare(self, late: Slot, load: int, same: Callable[[], bool]) -> Slot | None:
        """Another worker with nothing, or clearly less, to do, taken; waits for one. None once it is not the same."""

        def spare() -> Slot | None:
            others = [s for s in self._free() if s is not late and not s.loading]
            least = min(others, key=_to_do, default=None)
            return least if least and (not least.calls or least.load + load <= late.load / 2) else None

        async with self._changed:
            await self._changed.wait_for(lambda: self._end is not None or not same() or spare())
        other = spare() if self._end is None and same() else None
        return None if other is None else _taken(other, load)

    def _tell_late(self, late: Try, other: Slot, what: str) -> None:
        """Counted each time, told once of each worker: if it is slow, all its calls are late."""
        self._hedged["workers/hedged"] += 1
        worker = late.slot.name, late.slot.made
        if worker not in self._told_late:
            self._told_late.add(worker)
            text = f"{late.slot.name}.{what} takes {time.monotonic() - late.began:.0f} s, longer than usual"
            self._tell("hedged", f"{text}; {other.name} is asked for the same, and the first answer is taken")

    async def _overtaken(self, call: Try) -> None:
        """The answer is not needed any more. A worker that gets on is told to stop; one that does not keeps the call,
        so that it is seen to hang (stall_s, timeout_s) and gets no other work in its place."""
        slot, before = call.slot, None
        while not call.answer.done():
            try:
                now = (await ask(slot, call.handle, "vitals()", SIGN_S, "vitals")).tokens
            except WorkerLost as lost:
                if slot.handle is call.handle:
                    await self._told_lost(slot, lost)
                self._lose(slot, call.handle, lost)
                break
            if before not in (None, now):
                call.answer.cancel()
                break
            before = now
            await asyncio.wait({call.answer}, timeout=LOOK_S)
        await asyncio.wait({call.answer})
        end = None if call.answer.cancelled() else call.answer.exception()
        if end is not None and isinstance(end.__cause__, RayError):
            self._tell("worker_lost", f"{end}; it is replaced, and its call was answered by another one")


def _to_do(slot: Slot) -> tuple[int, int]:
    return slot.load, slot.calls


def _taken(slot: Slot, load: int) -> Slot:
    """A worker that has this to do, too."""
    if not slot.calls:
        slot.progress.begin(time.monotonic())
    slot.load += load
    slot.calls += 1
    return slot
