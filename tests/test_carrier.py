"""Weights go to a node once, whoever is lost on the way; on fakes. The real way: tests/cluster/test_nodes.py."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rlkd.core.errors import InfrastructureError, WorkerLost
from rlkd.core.ports import WeightRef
from rlkd.workers.carrier import Carrier
from tests.pool_fakes import Remote, nothing, run

REF = WeightRef(1, "/there", "digest", "learner's")
Act = Callable[["FakePorter"], Coroutine[Any, Any, None]]


@dataclass
class FakePorter:
    """One that does as it is told."""

    world: "World"
    node: str
    number: int  # the n-th on this node

    def __getattr__(self, name: str) -> Remote:
        run: Callable[..., Coroutine[Any, Any, Any]] = getattr(type(self), f"do_{name}").__get__(self)
        return Remote(lambda *arguments: asyncio.ensure_future(run(*arguments)))  # also if nobody awaits it

    async def do_land(self, ref: WeightRef, source: "FakePorter") -> tuple[WeightRef, int]:
        self.world.asked[self.node] += 1
        await self.world.on_land(self)
        if source in self.world.dead:
            raise RayTaskError("land", "traceback", WorkerLost("the porter of the learner's node: ActorDiedError"))
        self.world.landed.append((self.node, ref.version))
        return replace(ref, where=f"/on/{self.node}", node=""), 100

    async def do_let_go(self) -> None:
        if self in self.world.dead:
            raise ActorDiedError()

    async def do_close(self) -> None:
        if self in self.world.dead:
            raise ActorDiedError()


@dataclass(eq=False)
class World:
    on_land: Act = nothing
    made: list[FakePorter] = field(default_factory=list)
    dead: list[FakePorter] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    landed: list[tuple[str, int]] = field(default_factory=list)

    def make(self, node: str) -> FakePorter:
        self.made.append(FakePorter(self, node, sum(p.node == node for p in self.made)))
        return self.made[-1]

    def carrier(self, always: bool = False) -> Carrier:
        return Carrier(self.make, 5.0, always, self.dead.append)


def test_once_a_node_and_version_and_never_to_the_learners_own() -> None:
    async def test() -> None:
        world = World()
        carrier = world.carrier()
        assert await carrier.bring(REF, "learner's") == REF
        assert await carrier.bring(replace(REF, node=""), "a") == replace(REF, node="")  # on a disk that all see
        assert not world.made
        found = await asyncio.gather(*(carrier.bring(REF, node) for node in "aabab"))
        assert [f.where for f in found] == ["/on/a", "/on/a", "/on/b", "/on/a", "/on/b"]
        assert sorted(world.landed) == [("a", 1), ("b", 1)]
        await carrier.bring(replace(REF, version=2), "a")
        assert world.landed[-1] == ("a", 2)
        assert (carrier.times, carrier.bytes) == (3, 300)
        assert len(world.made) == 3  # one beside the learner, one on each node
        await carrier.close()
        assert len(world.dead) == 3

    run(test())


def test_always_also_to_the_learners_own_node() -> None:
    async def test() -> None:
        world = World()
        found = await world.carrier(always=True).bring(REF, "learner's")
        assert found.where == "/on/learner's"
        assert len(world.made) == 2

    run(test())


@pytest.mark.parametrize("who", ["a", "learner's"])
def test_a_lost_porter_is_replaced_once(who: str) -> None:
    """Whichever of the two it is."""

    async def test() -> None:
        async def dies(porter: FakePorter) -> None:
            if world.asked["a"] == 1:
                victim = next(p for p in world.made if p.node == who)
                world.dead.append(victim)
                if victim is porter:
                    raise ActorDiedError()

        world = World(dies)
        found = await world.carrier().bring(REF, "a")
        assert found.where == "/on/a"
        assert world.asked["a"] == 2
        assert sum(p.node == who for p in world.made) == 2

    run(test())


def test_if_it_cannot_be_brought_the_worker_is_lost_and_the_next_one_tries_again() -> None:
    async def test() -> None:
        async def dies(_: FakePorter) -> None:
            if world.asked["a"] <= 2:
                raise ActorDiedError()

        world = World(dies)
        carrier = world.carrier()
        with pytest.raises(WorkerLost, match="weights of version 1 to node a"):
            await carrier.bring(REF, "a")
        assert (await carrier.bring(REF, "a")).where == "/on/a"

    run(test())


def test_a_version_that_was_overwritten_is_said_to_be() -> None:
    """The pool asks for the next one then; no porter is to blame."""

    async def test() -> None:
        async def late(_: FakePorter) -> None:
            raise RayTaskError("land", "traceback", InfrastructureError("RLKD-I601", "version 3 is in their place"))

        world = World(late)
        with pytest.raises(InfrastructureError, match="RLKD-I601"):
            await world.carrier().bring(REF, "a")
        assert not world.dead

    run(test())
