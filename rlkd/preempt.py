"""Machines that go away with notice: which nodes, by when, and what that means for the run.

    a node with workers only          the pools leave it (`on_nodes`); the run goes on
    the driver's or a learner's node  the run saves and ends: `Stop.ask`, exit 75
    preempt.must_end_by               the same, early enough for a save

Ray's draining set is asked every `poll_s`. Who was once in it is remembered: a worker that dies on such a node was
preempted, whatever Ray says of its death. Deadlines come as wall-clock times and become seconds that are left at once;
one that is over when it is first seen is from a clock that differs from ours, and counts as unknown.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from rlkd.config.schema import PreemptConfig
from rlkd.core.errors import ConfigError
from rlkd.core.stop import Stop, StopRequest, seconds_until
from rlkd.workers.aside import OneAtATime

Left = Mapping[str, float | None]  # node → seconds until it is gone, None where nobody knows
ASK_S = 10.0  # for an answer from Ray
FIRST_SAVE_S = 30.0  # what a save is taken to last before one was measured


@dataclass
class Watcher:
    """`run` is a task in the driver's event loop. Made before the actors (`was_draining` is asked by their pools);
    `essential` and `on_nodes` are set when they are there."""

    config: PreemptConfig
    stop: Stop
    draining: Callable[[], Mapping[str, float]]  # node → Unix time in ms, 0: unknown; may raise: Ray is away
    tell: Callable[..., None]  # an event: its kind, its text
    essential: Callable[[], Collection[str]] = tuple  # nodes the run cannot do without: the driver's and the learner's
    on_nodes: Callable[[Left], None] = lambda _: None  # new draining nodes that are not essential
    save_s: Callable[[], float | None] = lambda: None  # what a save takes
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    known: dict[str, float | None] = field(default_factory=dict, init=False)  # every node that ever drained

    def __post_init__(self) -> None:
        self._last = -self.config.coalesce_s  # when a drain was last seen, this clock
        self._deaf = False
        self._ask = OneAtATime(ASK_S)
        self._end = self._must_end()

    def was_draining(self, node: str) -> bool:
        """Whether this node was ever about to be taken away: what dies there was preempted."""
        return node in self.known

    def settles_in_s(self) -> float:
        """Seconds until no node has begun to drain for `coalesce_s`: who rebuilds something before may do it twice."""
        return max(0.0, self._last + self.config.coalesce_s - self.clock())

    async def run(self) -> None:
        while True:
            self.look(*await self._asked())
            await asyncio.sleep(self.config.poll_s)

    async def _asked(self) -> tuple[Mapping[str, float], Collection[str]]:
        """The draining set and, if somebody is new in it, the essential nodes: from a thread, for Ray may not answer.
        That is told once, and asked again; what it knew is seen later."""
        try:
            found = await self._ask(self.draining)
            new = found.keys() - self.known.keys()
            essential = await self._ask(self.essential) if new else ()
        except Exception as error:  # Ray's own errors of all kinds: its head restarts, the network is gone
            if not self._deaf:
                self.tell("preempt", f"Ray does not say which nodes are drained: {type(error).__name__}: {error}")
            self._deaf = True
            return {}, ()
        self._deaf = False
        return found, essential

    def look(self, draining: Mapping[str, float], essential: Collection[str]) -> None:
        """One poll: nodes that are new in the draining set, and the clock."""
        if new := {node: self._deadline(ms) for node, ms in draining.items() if node not in self.known}:
            self._last = self.clock()
            free = {node: deadline for node, deadline in new.items() if node not in essential}
            self.known |= new
            for node in new:
                where = "the run's own node" if node in essential else "a node with workers"
                self.tell("preempt", f"{where} is taken away {self._when(new[node])}: {node[:12]}")
            if free:
                self.on_nodes({n: None if d is None else max(0.0, d - self.clock()) for n, d in free.items()})
            for node in sorted(new.keys() & set(essential), key=lambda n: new[n] or float("inf")):
                text = f"node {node[:12]} is taken away {self._when(new[node])}"
                self.stop.ask(StopRequest("drain", text, new[node]))
        self._look_at_clock()

    def _deadline(self, ms: float) -> float | None:
        left = ms / 1000 - self.wall()
        return None if ms <= 0 or left <= 0 else self.clock() + left

    def _when(self, deadline: float | None) -> str:
        return "soon" if deadline is None else f"in {max(0.0, deadline - self.clock()):.0f} s"

    def _must_end(self) -> float | None:
        when = self.config.must_end_by
        if when is None:
            return None
        left = seconds_until(when, self.wall())
        if left <= 0:
            raise ConfigError(
                "RLKD-C412",
                f"preempt.must_end_by={when} is over since {-left:.0f} s",
                where="preempt.must_end_by",
                fix="a later time, or seconds after the start",
            )
        return self.clock() + left

    def _look_at_clock(self) -> None:
        if self._end is None:
            return
        took = self.save_s()
        needed = (FIRST_SAVE_S if took is None else 1.5 * took) + self.config.margin_s
        if self._end - self.clock() <= needed:
            self.stop.ask(StopRequest("deadline", "preempt.must_end_by", self._end))
            self._end = None


@asynccontextmanager
async def watching(watcher: Watcher) -> AsyncIterator[None]:
    """The watcher at work, within the context. Its own errors end the run: a run that is deaf to notices looks well."""
    task = asyncio.create_task(watcher.run(), name="preemption watcher")
    task.add_done_callback(lambda done: _stop_if_failed(done, watcher))
    try:
        yield
    except BaseException:
        await _ended(task)  # its own error has been told, and must not hide how the run ended
        raise
    if (error := await _ended(task)) is not None:
        raise error


async def _ended(task: "asyncio.Task[None]") -> BaseException | None:
    task.cancel()
    (error,) = await asyncio.gather(task, return_exceptions=True)
    return None if isinstance(error, asyncio.CancelledError) else error


def _stop_if_failed(task: "asyncio.Task[None]", watcher: Watcher) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        watcher.stop.ask(StopRequest("drain", f"the watcher for preemption failed ({error!r})"))
