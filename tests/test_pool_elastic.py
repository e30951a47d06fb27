"""A pool that begins with a few workers, takes more when there is room, and goes on with fewer; on fakes."""

import asyncio
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError

from rlkd.core.errors import NodesGone, NoWorkers, WorkerLost
from rlkd.core.ports import WeightRef
from rlkd.workers.network import interface_of, talk_over
from rlkd.workers.pool import Pool, PoolOptions
from tests.pool_fakes import PROMPT, QUICK, SAMPLING, Fakes, FakeWorker, run, until, weights


class Room:
    """Seats of a cluster: `seated` waits for them."""

    def __init__(self, *free: int) -> None:
        self.free = set(free)
        self.asked: list[int] = []

    async def seated(self, index: int) -> None:
        self.asked.append(index)
        await until(lambda: index in self.free)


def elastic(fakes: Fakes, room: Room, size: int, options: PoolOptions) -> Pool:
    tell = lambda kind, text: fakes.told.append((kind, text))  # noqa: E731
    return Pool("rollout", fakes.spawn, size, SAMPLING, options, fakes.killed.append, tell, seated=room.seated)


def test_it_starts_with_the_first_and_the_others_join_with_the_newest_weights() -> None:
    async def test() -> None:
        fakes, room = Fakes(), Room(0)
        pool = elastic(fakes, room, 3, replace(QUICK, start_with=1, status_s=0.01))
        await pool.start()
        assert pool.ready == 1
        await pool.deliver(weights(1))
        assert pool.version == 1  # it does not wait for who has no place
        await until(lambda: sum(kind == "workers" for kind, _ in fakes.told) == 2)
        assert ("workers", "rollout-2 waits for a node with room; 1 of 3 are there") in fakes.told
        await pool.deliver(weights(2))
        room.free.add(2)
        await until(lambda: pool.ready == 2)
        assert [(w.index, w.version) for w in fakes.made] == [(0, 2), (2, 2)]
        assert ("workers", "rollout-2 has come, on host (node-0): 2 of 3 are there") in fakes.told
        await asyncio.gather(*(pool.generate(PROMPT) for _ in range(4)))
        assert {index for index, *_ in fakes.work} == {0, 2}
        assert pool.roster()["rollout-1"]["state"] == "waits for a node with room"
        pool.close()

    run(test())


def test_waiting_for_room_is_nobodys_fault() -> None:
    """A worker whose node is gone may wait long, and is then neither late nor out."""

    async def test() -> None:
        async def once(worker: FakeWorker) -> None:
            if worker.generation == 0 and worker.index == 1:
                room.free.discard(1)
                raise ActorDiedError()

        fakes, room = Fakes(on_generate=once), Room(0, 1)
        pool = elastic(fakes, room, 2, replace(QUICK, start_s=0.05))
        await pool.start()
        lost = await asyncio.gather(*(pool.generate(PROMPT) for _ in range(2)), return_exceptions=True)
        assert sum(isinstance(r, WorkerLost) for r in lost) == 1
        await asyncio.sleep(0.2)  # four times what a start may take
        assert pool.counts()["lost"] == 1
        assert pool.roster()["rollout-1"]["state"] == "waits for a node with room"
        room.free.add(1)
        await until(lambda: pool.ready == 2)
        pool.close()

    run(test())


@pytest.mark.parametrize(("homeless", "error"), [(True, NodesGone), (False, NoWorkers)])
def test_below_the_minimum_the_run_ends_and_says_whether_nodes_are_missing(
    homeless: bool, error: type[Exception]
) -> None:
    """One of two workers is there, and two are asked for. At least one asked for (the control): it goes on."""

    async def ends(at_least: int) -> None:
        async def never(worker: FakeWorker) -> None:
            if worker.generation:
                await asyncio.Event().wait()

        async def dies(worker: FakeWorker) -> None:
            if worker.index == 1:
                room.free -= {1} if homeless else set()
                raise ActorDiedError()

        fakes, room = Fakes(on_start=never, on_generate=dies), Room(0, 1)
        limits = replace(QUICK, start_s=1000.0, at_least=at_least, nobody_s=0.1, status_s=0.02)
        pool = elastic(fakes, room, 2, limits)
        await pool.start()
        await asyncio.gather(*(pool.generate(PROMPT) for _ in range(2)), return_exceptions=True)
        await asyncio.sleep(0.5)
        if at_least == 1:
            await pool.generate(PROMPT)
        else:
            with pytest.raises(error, match=r"RLKD-I613.*1 of at least 2 workers for .* s: rollout-1") as caught:
                await pool.generate(PROMPT)
            assert type(caught.value) is error
        pool.close()

    run(ends(2))
    run(ends(1))


def test_a_worker_loads_what_was_brought_to_its_node() -> None:
    async def test() -> None:
        loaded: list[str] = []

        async def note(_: FakeWorker, ref: WeightRef) -> None:
            loaded.append(ref.where)

        async def bring(ref: WeightRef, node: str) -> WeightRef:
            return replace(ref, where=f"on {node}")

        fakes = Fakes(on_load=note, node_of=lambda worker: f"n{worker.index}")
        pool = Pool("rollout", fakes.spawn, 2, SAMPLING, QUICK, fakes.killed.append, bring=bring)
        await pool.start()
        await pool.deliver(weights(1))
        assert sorted(loaded) == ["on n0", "on n1"]
        pool.close()

    run(test())


def test_gloo_talks_over_the_interface_of_the_nodes_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    environment = {"GLOO_SOCKET_IFNAME": "eth7"}
    talk_over("127.0.0.1", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth7"}  # the user's choice stands
    talk_over("127.0.0.1", empty := {})
    assert empty == {"GLOO_SOCKET_IFNAME": "lo"}
    talk_over("203.0.113.7", empty := {})
    assert empty == {}
