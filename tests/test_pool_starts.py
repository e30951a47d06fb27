"""Workers that cannot start, or find no node while the run starts; on fakes."""

import asyncio
import gc
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError

from rlkd.core.errors import INFRASTRUCTURE, RESUBMIT, InfrastructureError, NodesGone, NoWorkers, PreflightError
from rlkd.workers.pool import Pool, PoolOptions
from tests.pool_fakes import PROMPT, QUICK, SAMPLING, Fakes, FakeWorker, dies, forever, run, until
from tests.test_pool_elastic import Room, elastic

FIX = "copy the model there"


def unloadable(why: str = "OSError: no file named model.safetensors") -> PreflightError:
    return PreflightError("RLKD-E601", f"the model cannot be loaded: {why}", "/models/m", FIX)


def refusing(*indices: int, why: str = "OSError: no file named model.safetensors") -> Fakes:
    """Workers die at their first call; these have replacements that cannot load the model."""

    async def refuses(worker: FakeWorker) -> None:
        if worker.generation and worker.index in indices:
            raise unloadable(why)

    return Fakes(on_start=refuses, on_generate=dies())


async def ask(pool: Pool, calls: int) -> list[object]:
    return list(await asyncio.gather(*(pool.generate(PROMPT) for _ in range(calls)), return_exceptions=True))


@pytest.mark.faults("F16")
@pytest.mark.parametrize("why", ["OSError: no file named model.safetensors", "OutOfMemoryError: CUDA out of memory"])
def test_a_replacement_that_cannot_start_is_lost_and_the_others_go_on(why: str) -> None:
    """Out of memory where it is says nothing of the others, which work."""

    async def test() -> None:
        fakes = refusing(1, why=why)
        pool = fakes.pool(3)
        await pool.start()
        await ask(pool, 3)
        await until(lambda: pool._slots[1].out is not None)
        assert sum(w.index == 1 for w in fakes.made) == 4  # as often as others that are lost
        told = [text for kind, text in fakes.told if kind == "worker_lost"]
        assert f"rollout-1 cannot start: RLKD-E601: the model cannot be loaded: {why} (fix: {FIX})" in told[0]
        assert any(kind == "quarantine" and "2 of 3 go on" in text and why in text for kind, text in fakes.told)
        assert not [r for r in await ask(pool, 6) if isinstance(r, Exception)]
        pool.close()

    run(test())


def test_a_late_worker_that_cannot_start_waits_before_its_next_try() -> None:
    async def test() -> None:
        async def refuses(worker: FakeWorker) -> None:
            if worker.index == 1 and worker.generation < 2:
                raise KeyError("oops")

        fakes = Fakes(on_start=refuses)
        pool = fakes.pool(2, replace(QUICK, start_with=1, backoff_s=0.05))
        await pool.start()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await until(lambda: pool.ready == 2)
        assert loop.time() - began >= 0.1  # twice
        assert any("rollout-1 cannot start: KeyError: 'oops'" in text for _, text in fakes.told)
        pool.close()

    run(test())


def test_when_no_replacement_can_start_the_caller_hears_why() -> None:
    async def test() -> None:
        fakes = refusing(0, 1)
        pool = fakes.pool(2)
        await pool.start()
        await ask(pool, 2)
        with pytest.raises(NoWorkers, match=f"RLKD-E601: the model cannot be loaded.*{FIX}") as caught:
            await pool.generate(PROMPT)
        assert caught.value.exit_code == INFRASTRUCTURE
        pool.close()

    run(test())


def test_below_the_minimum_the_caller_hears_why_too() -> None:
    async def test() -> None:
        fakes = refusing(1)
        pool = fakes.pool(2, replace(QUICK, at_least=2, nobody_s=0.2))
        await pool.start()
        await ask(pool, 2)
        await until(lambda: pool._end is not None)
        with pytest.raises(InfrastructureError, match=r"RLKD-I613.*rollout-1 is out.*the model cannot be loaded"):
            await pool.generate(PROMPT)
        pool.close()

    run(test())


def test_what_keeps_the_first_from_starting_is_still_the_starts_error() -> None:
    async def test() -> None:
        async def refuses(worker: FakeWorker) -> None:
            if worker.index == 1:
                raise unloadable()

        pool = Fakes(on_start=refuses).pool(2)
        with pytest.raises(PreflightError, match="E601"):
            await pool.start()

    run(test())


@pytest.mark.faults("F15")
def test_a_node_lost_while_the_run_starts_is_waited_for_so_long_and_no_longer() -> None:
    """The process comes up, its node goes, and Ray finds no other. The other worker is there all the time."""

    async def test() -> None:
        async def with_its_node(worker: FakeWorker) -> None:
            if worker.index == 1:
                room.free.discard(1)
                raise ActorDiedError()

        fakes, room = Fakes(on_start=with_its_node), Room(0, 1)
        pool = elastic(fakes, room, 2, replace(QUICK, nobody_s=0.2, status_s=0.05))
        with pytest.raises(NodesGone, match=r"RLKD-I613.*1 of at least 2 workers for .*: rollout-1 waits for a") as end:
            await asyncio.wait_for(pool.start(), 5)
        assert end.value.exit_code == RESUBMIT
        assert any(kind == "waiting" and "giving up after 0.2 s" in text for kind, text in fakes.told)
        assert {w.index for w in fakes.killed} == {0, 1}

    run(test())


def test_a_worker_that_has_its_node_may_take_longer_to_start() -> None:
    """Control: loading a large model has a limit of its own."""

    async def test() -> None:
        async def slow(_: FakeWorker) -> None:
            await asyncio.sleep(0.4)

        fakes = Fakes(on_start=slow)
        pool = elastic(fakes, Room(0, 1), 2, PoolOptions(nobody_s=0.1, status_s=0.02))
        await pool.start()
        assert pool.ready == 2
        assert not [text for kind, text in fakes.told if kind == "waiting"]
        assert (await pool.generate(PROMPT, 1, 0, SAMPLING))[0].tokens[0] in (0, 1)
        pool.close()

    run(test())


def test_a_start_that_is_cancelled_leaves_nothing_to_be_printed() -> None:
    """asyncio prints a traceback for an error that nobody asks for: SIGTERM at the start looked like a crash."""

    async def test() -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        pool = Fakes(on_start=lambda _: forever()).pool(2)
        starting = asyncio.create_task(pool.start())
        await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        del starting, pool
        for _ in range(3):
            await asyncio.sleep(0.01)
            gc.collect()
        assert told == []

    run(test())
