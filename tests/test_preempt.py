"""Nodes that go away with notice, by a fake of Ray's draining set and clocks that stand still."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from rlkd.config.schema import PreemptConfig
from rlkd.core.errors import ConfigError
from rlkd.core.stop import Stop, StopRequest
from rlkd.preempt import Watcher, watching
from rlkd.run import essential_nodes

WALL = 1_800_000_000.0  # Unix time when the tests begin


@dataclass
class World:
    """Ray's notices, two clocks, and what the watcher did."""

    config: PreemptConfig = field(default_factory=PreemptConfig)
    draining: dict[str, float] = field(default_factory=dict)
    now: float = 100.0  # monotonic
    skew: float = 0.0  # of the wall clock
    save_s: float | None = None
    told: list[str] = field(default_factory=list)
    left: list[Mapping[str, float | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stop = Stop(clock=lambda: self.now)

        def tell(kind: str, text: str) -> None:
            self.told.append(f"[{kind}] {text}")

        self.watcher = Watcher(
            self.config, self.stop, lambda: dict(self.draining), tell, lambda: {"head"},
            self.left.append, lambda: self.save_s, lambda: self.now, lambda: self.wall,
        )  # fmt: skip

    @property
    def wall(self) -> float:
        return WALL + self.now - 100.0 + self.skew

    def notice(self, node: str, seconds: float | None) -> None:
        self.draining[node] = 0.0 if seconds is None else (WALL + self.now - 100.0 + seconds) * 1000

    def poll(self, later: float = 0.0) -> None:
        self.now += later
        self.watcher.look(self.draining, {"head"})


@pytest.mark.faults("F10")
def test_workers_leave_their_node_and_the_run_goes_on() -> None:
    world = World()
    world.poll()
    world.notice("w1", 118.0)
    world.poll(1.0)
    world.poll(1.0)
    assert world.left == [{"w1": pytest.approx(117.0)}]  # once
    assert world.told == ["[preempt] a node with workers is taken away in 117 s: w1"]
    assert not world.stop.is_set()


@pytest.mark.faults("F11")
def test_the_drivers_or_the_learners_node_ends_the_run() -> None:
    world = World()
    world.notice("w1", 60.0)
    world.notice("head", 30.0)
    world.poll()
    assert world.left == [{"w1": pytest.approx(60.0)}]
    assert world.stop.request is not None
    assert (world.stop.request.kind, world.stop.request.text) == ("drain", "node head is taken away in 30 s")
    assert world.stop.left_s() == pytest.approx(30.0)


@pytest.mark.faults("F13")
def test_who_ever_drained_is_remembered() -> None:
    """Ray forgets a node that is dead, and says of its actors that they were not preempted (M6)."""
    world = World()
    world.notice("w1", 8.0)
    world.poll()
    world.draining.clear()
    world.poll(20.0)
    assert world.watcher.was_draining("w1")
    assert not world.watcher.was_draining("w2")


@pytest.mark.faults("F14")
def test_drains_that_follow_each_other_are_one_event() -> None:
    """Work moves at once; who rebuilds something waits until no more nodes go."""
    world = World(PreemptConfig(coalesce_s=5.0))
    assert world.watcher.settles_in_s() == 0.0
    world.notice("a", 120.0)
    world.poll()
    assert world.watcher.settles_in_s() == 5.0
    world.notice("b", 120.0)
    world.poll(3.0)
    assert world.watcher.settles_in_s() == 5.0
    world.poll(4.0)
    assert world.watcher.settles_in_s() == 1.0
    world.poll(1.0)
    assert world.watcher.settles_in_s() == 0.0
    assert [set(nodes) for nodes in world.left] == [{"a"}, {"b"}]


@pytest.mark.faults("F14")
def test_of_several_requests_the_earliest_deadline_holds() -> None:
    world = World()
    world.notice("head", 90.0)
    world.poll()
    world.stop.ask(StopRequest("signal", "SIGTERM", world.now + 30.0))
    assert world.stop.left_s() == pytest.approx(30.0)
    assert world.stop.request is not None
    assert world.stop.request.kind == "drain"


@pytest.mark.faults("F66")
@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_moves_no_deadline(jump: float) -> None:
    world = World(PreemptConfig(must_end_by="600"))
    world.notice("head", 30.0)
    world.poll()
    world.skew = jump
    world.poll(10.0)
    assert world.stop.left_s() == pytest.approx(20.0)


@pytest.mark.faults("F66")
def test_a_deadline_that_is_over_when_it_is_first_seen_is_unknown() -> None:
    """Another machine's clock, an hour behind: the run saves, and does not think that there is no time for it."""
    world = World(skew=3600.0)
    world.notice("head", 30.0)
    world.notice("w1", None)
    world.poll()
    assert world.stop.request == StopRequest("drain", "node head is taken away soon", None)
    assert world.left == [{"w1": None}]


def test_must_end_by_leaves_time_for_a_save() -> None:
    world = World(PreemptConfig(must_end_by="600", margin_s=10.0), save_s=20.0)
    world.poll(559.0)
    assert not world.stop.is_set()
    world.poll(2.0)
    assert world.stop.request == StopRequest("deadline", "preempt.must_end_by", 700.0)
    asked = len(world.stop._asked)
    world.poll(5.0)
    assert len(world.stop._asked) == asked


def test_must_end_by_before_any_save_was_measured() -> None:
    world = World(PreemptConfig(must_end_by="600", margin_s=10.0))
    world.poll(559.0)
    assert not world.stop.is_set()
    world.poll(2.0)
    assert world.stop.is_set()


def test_must_end_by_in_the_past_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2027-01-01T00:00Z is over since \d+ s"):
        World(PreemptConfig(must_end_by="2027-01-01T00:00Z"))


def watched(draining: Callable[[], Mapping[str, float]], polls: int, **more: Any) -> World:
    """A watcher at work until it has polled so often."""
    world, asked, enough = World(PreemptConfig(poll_s=0.01)), [], threading.Event()

    def ask() -> Mapping[str, float]:
        asked.append(1)
        if len(asked) >= polls:
            enough.set()
        return draining()

    world.watcher.draining = ask
    for name, value in more.items():
        setattr(world.watcher, name, value)

    async def main() -> None:
        async with watching(world.watcher):
            await asyncio.to_thread(enough.wait, 10)
            await asyncio.sleep(0.05)

    asyncio.run(main())
    return world


def test_ray_being_away_is_told_once_and_not_the_end() -> None:
    answers = iter([{}, ConnectionError("no head"), ConnectionError("no head"), {"w1": 0.0}])

    def draining() -> Mapping[str, float]:
        answer = next(answers, {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    world = watched(draining, 5)
    assert world.told == [
        "[preempt] Ray does not say which nodes are drained: ConnectionError: no head",
        "[preempt] a node with workers is taken away soon: w1",
    ]
    assert world.left == [{"w1": None}]


def test_it_ends_when_it_is_told_to_also_with_an_answer_on_its_way() -> None:
    """`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes together with the answer."""

    async def main() -> None:
        for i in range(100):
            task = asyncio.create_task(World(PreemptConfig(poll_s=1e-6)).watcher.run())
            await asyncio.sleep(i * 1e-5)
            task.cancel()
            ended, _ = await asyncio.wait({task}, timeout=2.0)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0.001)
            assert ended

    asyncio.run(main())


def test_a_watcher_that_fails_ends_the_run() -> None:
    """A run that hears no more notices looks well until it is too late."""

    def fail(_: object) -> None:
        raise ZeroDivisionError("oh")

    world = World(PreemptConfig(poll_s=0.01))
    world.notice("w1", 30.0)
    world.watcher.on_nodes = fail

    async def main() -> None:
        async with watching(world.watcher):
            await asyncio.wait_for(world.stop.wait(), 10)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert world.stop.request is not None
    assert "the watcher for preemption failed (ZeroDivisionError('oh'))" in world.stop.request.text


def test_who_does_not_answer_is_asked_no_second_time_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.preempt.ASK_S", 0.05)
    never, asked, world = threading.Event(), [], World(PreemptConfig(poll_s=0.01))

    def draining() -> Mapping[str, float]:
        asked.append(1)
        never.wait(60)
        return {}

    world.watcher.draining = draining

    async def main() -> None:
        async with watching(world.watcher):
            await asyncio.sleep(0.3)

    asyncio.run(main())  # with asyncio.to_thread this waits for a minute
    assert asked == [1]
    assert not never.is_set()
    assert len(world.told) == 1
    never.set()


class Actor:
    """A handle."""

    def __init__(self, number: int) -> None:
        self._actor_id = bytes([number])


def test_only_the_run_s_own_learner_makes_nodes_essential(monkeypatch: pytest.MonkeyPatch) -> None:
    """All trials of a sweep are in one Ray job: the learner of another one may go, and this run goes on."""
    rows = {
        f"{number:02x}": {"ActorClassName": "LearnerRank", "State": state, "Address": {"NodeID": node}}
        for number, (node, state) in enumerate(
            [("mine", "ALIVE"), ("of-another-trial", "ALIVE"), ("left", "DEAD"), ("", "PENDING_CREATION")]
        )
    }
    context = SimpleNamespace(get_job_id=lambda: "01000000", get_node_id=lambda: "driver")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr("ray._private.state.actors", lambda **_: rows)
    learner = SimpleNamespace(actors=(Actor(0), Actor(2), Actor(3)))
    assert essential_nodes(learner) == {"driver", "mine"}
    learner.actors = (Actor(1),)  # it was rebuilt elsewhere
    assert essential_nodes(learner) == {"driver", "of-another-trial"}
    learner.actors = ()  # it is lost: Ray need not be asked
    monkeypatch.setattr("ray._private.state.actors", None)
    assert essential_nodes(learner) == {"driver"}
