"""Workers in their places: brought up, looked at, replaced when lost, moved off a node that goes away. `Pool` gives
them work.

Ray restarts nothing here. An actor it restarts comes back with its first weights, and the caller cannot tell; a worker
made here gets no work before `_equip` has given it what the others have.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from ray.exceptions import RayError, RayTaskError

from rlkd.core.errors import NodesGone, NoWorkers, RlkdError, WorkerLost
from rlkd.workers.ask import Slot, ask
from rlkd.workers.limits import End, PoolOptions
from rlkd.workers.losses import CannotStart, Kind, Losses, Progress
from rlkd.workers.places import Places

STACKS_S = 15.0  # for the stacks of a worker that is about to be killed

Seated = Callable[[int], Awaitable[None]]
Stacks = Callable[[str, Any], Awaitable[str]]  # a worker's name and Place -> where its stacks were written, in words


class Crew(Places):
    """Up to `size` workers, made by `spawn(index)`: handles with remote methods start, where, vitals.

    `seated(index)` returns when the cluster has room for that one: nothing is made before, and waiting for it is
    nobody's fault. The first `options.start_with` must be there for the start; the others come when they can. What
    keeps one of the first from starting is the start's error; from then on it is that worker's loss.

    Everything runs on one event loop. A worker that dies, hangs, or has work and makes no headway is killed and
    replaced; who waits for it gets WorkerLost at once. One that is lost too often is out, and the others go on; when
    all are out, or fewer than `at_least` are there for `nobody_s`, every call raises NoWorkers (NodesGone if their
    nodes went away). So does the start when one of the first finds no node for as long.
    """

    def __init__(
        self,
        name: str,
        spawn: Callable[[int], Any],
        size: int,
        options: PoolOptions,
        kill: Callable[[Any], None],
        tell: Callable[[str, str], None],
        was_draining: Callable[[str], bool],
        stacks: Stacks | None,
        seated: Seated | None,
    ) -> None:
        super().__init__(name, size, options, kill, tell, was_draining)
        self._spawn, self._stacks, self._seated = spawn, stacks, seated
        self._started = False  # the first are there

    async def _equip(self, slot: Slot) -> None:
        """Give a new worker what it needs before it gets work. WorkerLost if it does not take it."""

    # --- for others

    async def start(self) -> None:
        """Make all workers and wait for the first. What a worker's start can explain (an RlkdError) is raised as it
        is."""
        o = self._options
        self._slots = [
            Slot(i, f"{self._name}-{i}", losses=Losses(o.replacements, o.window_s, o.in_window))
            for i in range(self._size)
        ]
        first, later = self._slots[: self._first], self._slots[self._first :]
        starting = [asyncio.create_task(self._bring_up(slot), name=f"start {slot.name}") for slot in first]
        together = asyncio.gather(*starting)
        together.add_done_callback(lambda done: done.cancelled() or done.exception())  # asyncio prints what nobody asks
        self._background(self._count_heads(), f"count {self._name}")
        try:
            await self._until_ended(together)
            self._check()
        except BaseException:
            for task in starting:
                task.cancel()
            self.close()
            raise
        self._started = True
        for slot in later:
            self._background(self._bring_up(slot), f"start {slot.name}")
        every = [s for s in (o.probe_s, o.stall_s and o.stall_s / 4) if s is not None]
        if every:
            self._background(self._look(min(every)), f"look at {self._name}")

    @property
    def _first(self) -> int:
        """So many must be there for the start."""
        return self._size if self._options.start_with is None else self._options.start_with

    def close(self) -> None:
        """Kill the workers."""
        self._end = End(f"{self._name}: the pool is closed")
        for task in self._tasks:
            task.cancel()
        for slot in (*self._slots, *self._leaving):
            self._discard(slot, WorkerLost(self._end.text))

    @property
    def ready(self) -> int:
        """Workers that get work now."""
        return sum(slot.ready for slot in self._slots)

    def counts(self) -> dict[str, int]:
        """Workers lost since the start, how many of these with their nodes, and workers replaced."""
        return dict(self._counts)

    def leave(self, node: str, left_s: float | None = None) -> int:
        """The node goes away in `left_s` seconds: its workers get no more work and are replaced elsewhere (that is for
        `spawn` to see to), and have until then to finish what they have. How many there are."""
        here = [slot for slot in self._slots if slot.handle is not None and slot.place and slot.place.node == node]
        for slot in here:
            slot.ready, slot.leaving = False, True
            self._counts["preempted"] += 1
            self._leaving.append(slot)
            new = self._slots[slot.index] = Slot(slot.index, slot.name, losses=slot.losses, made=slot.made)
            slot.losses.last = Kind.PREEMPT
            self._background(self._finish(slot, left_s), f"end of {slot.name} on a node that goes away")
            self._background(self._bring_up(new), f"move {slot.name}")
        if here:
            names = ", ".join(slot.name for slot in here)
            soon = "" if left_s is None else f" in {left_s:.0f} s"
            self._tell("preempted", f"{names}: the node goes away{soon}; moving to another one")
        return len(here)

    def roster(self) -> dict[str, dict[str, Any]]:
        """Who is where, doing what, for `rlkd why-stuck`: by worker's name."""
        now = time.monotonic()
        rows: dict[str, dict[str, Any]] = {}
        for slot in (*self._leaving, *self._slots):
            place = asdict(slot.place) if slot.place is not None and slot.handle is not None else {}
            tokens = slot.vitals.tokens if slot.vitals is not None else None
            waits = now - slot.progress.since if slot.ready and slot.calls else None
            rows[slot.name] = {**place, "state": slot.state, "calls": slot.calls, "tokens": tokens, "idle_s": waits}
        return rows

    # --- bringing up

    async def _bring_up(self, slot: Slot) -> None:
        """Make workers for a slot until one has what it needs."""
        least_s = 0.0  # between two tries
        while self._end is None and slot.out is None:
            if pause := max(slot.losses.pause_s(self._options.backoff_s), least_s):
                slot.state = f"waits {pause:g} s before it is started again"
                await asyncio.sleep(pause)
            await self._find_room(slot)
            slot.lost = asyncio.get_running_loop().create_future()
            slot.place = slot.vitals = None
            slot.state, slot.made = "is starting", slot.made + 1
            slot.handle = self._spawn(slot.index)
            try:
                await self._come_up(slot)
            except WorkerLost as error:
                if slot.leaving:  # another slot has its seat by now
                    break
                least_s = self._options.backoff_s if isinstance(error, CannotStart) else 0.0
                self._discard(slot, error)
                self._charge(slot, error)
                continue
            if slot.leaving:
                break
            slot.progress = Progress(since=time.monotonic())
            slot.ready, slot.state = True, "is ready"
            self._counts["replaced"] += slot.made > 1
            self._tell_how_many(slot)
            break
        await self._notify()

    async def _come_up(self, slot: Slot) -> None:
        """From a new process to one that may get work. WorkerLost if that does not succeed, and while the crew starts
        whatever its own code raises."""
        try:
            await ask(slot, slot.handle, "start()", self._options.start_s, "start")
            slot.place = await ask(slot, slot.handle, "where()", self._options.start_s, "where")
            await self._equip(slot)
        except WorkerLost:
            raise
        except Exception as error:  # of any kind: what is wrong on its node need not be wrong where the others are
            if not self._started:
                raise
            lost = CannotStart(f"{slot.name} cannot start: {_cause(error)}")
            self._tell("worker_lost", f"{lost}; {self.ready} of {self._size} go on")
            raise lost from error

    async def _find_room(self, slot: Slot) -> None:
        """Wait for a place on the cluster; said once if that takes long."""
        if self._seated is None:
            return
        slot.state, slot.homeless = "waits for a node with room", True
        waiting = asyncio.ensure_future(self._seated(slot.index))
        try:
            if not (await asyncio.wait({waiting}, timeout=self._options.status_s))[0]:
                self._tell("workers", f"{slot.name} waits for a node with room; {self.ready} of {self._size} are there")
            await waiting
        finally:
            waiting.cancel()
        slot.homeless = False

    def _tell_how_many(self, slot: Slot) -> None:
        """Of one that came later than the start, if the crew's size may change."""
        late = self._options.start_with is not None and (slot.made > 1 or slot.index >= self._options.start_with)
        if late and slot.place is not None:
            where = f"{slot.place.host} ({slot.place.node[:8]})"
            self._tell("workers", f"{slot.name} has come, on {where}: {self.ready} of {self._size} are there")

    # --- looking after

    async def _look(self, every_s: float) -> None:
        """A worker may be stuck while its actor lives, and nobody may be waiting for it: ask all now and then."""
        while self._end is None:
            await asyncio.sleep(every_s)
            timeout_s = self._options.probe_s or every_s
            await asyncio.gather(*(self._look_at(slot, timeout_s) for slot in self._slots if slot.ready))

    async def _look_at(self, slot: Slot, timeout_s: float) -> None:
        handle, most = slot.handle, self._options.stall_s
        try:
            vitals = await ask(slot, handle, "vitals()", timeout_s, "vitals")
            if slot.handle is not handle:
                return
            slot.vitals = vitals
            at_work = slot.calls > 0 and not slot.loading
            still_s = slot.progress.seen(vitals.tokens, at_work, time.monotonic())
            if most is not None and still_s > most:
                what = f"no progress for {still_s:.0f} s with {slot.calls} calls under way"
                raise WorkerLost(f"{slot.name}: {what}")
        except WorkerLost as error:
            if handle is not None and handle is slot.handle:
                await self._told_lost(slot, error)
            self._lose(slot, handle, error)

    async def _told_lost(self, slot: Slot, lost: WorkerLost) -> None:
        """Nobody may have been waiting for it: say so here. If it only hangs, with its stacks."""
        if isinstance(lost.__cause__, RayError):
            self._tell("worker_lost", f"{lost}; it is replaced")
        else:
            self._tell("stalled", f"{lost}{await self._stack(slot)}; it is killed and replaced")

    async def _stack(self, slot: Slot) -> str:
        """What it was doing, on disk; in words for the line about it."""
        if self._stacks is None or slot.place is None:
            return ""
        try:
            async with asyncio.timeout(STACKS_S):
                return "; " + await self._stacks(slot.name, slot.place)
        except TimeoutError:
            return f"; its stacks could not be taken within {STACKS_S:g} s"

    async def _count_heads(self) -> None:
        """With too few workers: say so now and then, and give up after `nobody_s`. While the crew starts only the time
        counts that one of the first has no node: what it does with one has limits of its own."""
        limit, since, told = self._options.nobody_s, None, 0.0
        while self._end is None:
            await asyncio.sleep(min(1.0, limit / 10))
            now, begun = time.monotonic(), self._started
            awaited = self._slots if begun else self._slots[: self._first]
            need = self._options.at_least if begun else len(awaited)
            if self.ready >= need or not (begun or any(s.homeless for s in awaited)):
                since = None
                continue
            if since is None:
                since = told = now
            who = "no worker" if need == 1 else f"{self.ready} of at least {need} workers"
            about = f"{who} for {now - since:.0f} s: {_states([s for s in awaited if not s.ready])}"
            if now - since > limit:
                gone = not begun or all(s.losses.last is Kind.PREEMPT or s.homeless for s in awaited if not s.ready)
                fix = f"{self._options.advice.nodes}; `ray status` shows what the cluster has"
                self._finish_all(End(f"{self._name}: {about}", "RLKD-I613", fix, NodesGone if gone else NoWorkers))
                await self._notify()
            elif now - told >= self._options.status_s:
                told = now
                self._tell("waiting", f"{self._name}: {about}; giving up after {limit:g} s")

    async def _finish(self, slot: Slot, left_s: float | None) -> None:
        """End a worker that leaves: when it has nothing left to do, or its time is up."""
        slot.state = "is leaving"
        async with self._changed:
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait_for(lambda: slot.handle is None or not slot.calls)
                text = "has left its node"
            except TimeoutError:
                text = f"its node goes away, and {slot.calls} calls did not end in time"
        self._discard(slot, WorkerLost(f"{slot.name}: {text}"))
        self._leaving.remove(slot)


def _states(slots: Sequence[Slot]) -> str:
    return ", ".join(f"{slot.name} {slot.state}" for slot in slots)


def _cause(error: Exception) -> str:
    """In one line, with what to do about it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RlkdError):
        return "; ".join(f"{p.code}: {p.what}" + (f" (fix: {p.fix})" if p.fix else "") for p in cause.problems)
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
