"""A late call is asked of a second worker: one answer to each call, and nothing left of the other; on fakes."""

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rlkd.config.load import load
from rlkd.core.errors import ConfigError, DataError, WorkerLost
from rlkd.fleet import _Builder
from rlkd.inputs import Inputs
from rlkd.workers import calls
from rlkd.workers.hedge import ENOUGH, RECENT, Pace
from rlkd.workers.pool import Pool
from rlkd.workers.threads import Threads
from tests.pool_fakes import PROMPT, QUICK, Fakes, FakeWorker, forever, nothing, run, until, weights
from tests.test_config_teachers import RECIPE

HEDGED = replace(QUICK, hedge=1.0, hedge_floor_s=0.01)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LOOK_S", 0.001)


async def ready(fakes: Fakes, size: int = 2, **options: Any) -> Pool:
    """A pool that knows what is usual."""
    behaves, fakes.on_generate = fakes.on_generate, nothing
    pool = fakes.pool(size, replace(HEDGED, **options))
    await pool.start()
    for _ in range(ENOUGH):
        await pool.generate(PROMPT)
    fakes.on_generate = behaves
    fakes.work.clear()
    return pool


def hedges(pool: Pool) -> tuple[float, float]:
    found = pool.metrics()
    return found["workers/hedged"], found["workers/hedged_won"]


async def idle(pool: Pool) -> None:
    """Nothing is under way, and nothing is left of what was."""
    await until(lambda: not any(slot.load or slot.calls for slot in pool._slots))


async def moves(pool: Pool, worker: FakeWorker) -> None:
    """It writes, until it has nothing to do."""
    while pool._slots[worker.index].calls:
        worker.tokens += 1
        await asyncio.sleep(0.001)


async def first_hangs(worker: FakeWorker) -> None:
    if (worker.index, worker.generation) == (0, 0):
        await forever()


def writer(written: list[Any]) -> int:
    """Who wrote it."""
    return int(written[0].tokens[0])


def test_what_is_late() -> None:
    pace = Pace(3.0, 10.0)
    for seconds in range(ENOUGH - 1):
        pace.took(100, float(seconds))
        assert pace.late_s(100) is None
    pace.took(100, 100.0)  # one of ten
    assert pace.late_s(100) == 3.0 * 8
    assert pace.late_s(70) == 24.0
    assert pace.late_s(200) is None  # may write much more
    for _ in range(RECENT):
        pace.took(100, 1.0)
    assert pace.late_s(100) == 10.0


@pytest.mark.faults("F3")
def test_the_answer_of_a_worker_that_has_time_is_taken_and_the_late_one_keeps_its_call_until_it_moves() -> None:
    async def test() -> None:
        fakes = Fakes(on_generate=first_hangs)
        pool = await ready(fakes)
        written = await pool.generate(PROMPT, 3)
        assert (writer(written), len(written)) == (1, 3)
        assert [index for index, *_ in fakes.work] == [0, 1]
        assert hedges(pool) == (1, 1)
        ((kind, text),) = fakes.told
        assert kind == "hedged"
        assert text.startswith("rollout-0.generate(prompt 12, samples 3) takes ")
        assert text.endswith("rollout-1 is asked for the same, and the first answer is taken")
        late, other = pool._slots
        assert (other.load, other.calls) == (0, 0)
        assert (late.load, late.calls) == (3, 1)  # it may hang: it gets nothing else, and is watched
        await moves(pool, fakes.made[0])  # it does not
        assert pool.counts()["lost"] == 0
        pool.close()

    run(test())


def test_one_that_gives_no_sign_of_life_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async def stopped(worker: FakeWorker) -> None:
            if worker.generation == worker.index == 0:
                await forever()

        monkeypatch.setattr(calls, "SIGN_S", 0.05)
        fakes = Fakes(on_generate=first_hangs, on_status=stopped)
        pool = await ready(fakes)
        assert writer(await pool.generate(PROMPT)) == 1
        await until(lambda: pool.counts()["replaced"] == 1)
        assert [kind for kind, _ in fakes.told] == ["hedged", "stalled"]
        await idle(pool)
        pool.close()

    run(test())


def test_one_that_hangs_is_found_although_nobody_waits_for_it_any_more() -> None:
    async def test() -> None:
        fakes = Fakes(on_generate=first_hangs)
        pool = await ready(fakes, stall_s=0.05)
        assert writer(await pool.generate(PROMPT)) == 1
        await until(lambda: pool.counts()["replaced"] == 1)
        assert any(kind == "stalled" and "rollout-0" in text for kind, text in fakes.told)
        await idle(pool)
        pool.close()

    run(test())


@pytest.mark.parametrize("options", [{"hedge": None}, {"hedge_floor_s": 1000.0}])
def test_without_it_the_call_waits(options: dict[str, Any]) -> None:
    async def test() -> None:
        pool = await ready(Fakes(on_generate=first_hangs), **options)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.generate(PROMPT), 0.2)
        await idle(pool)
        assert ("workers/hedged" in pool.metrics()) is (options.get("hedge", 1.0) is not None)
        pool.close()

    run(test())


def test_who_has_as_much_to_do_is_not_asked_before_it_has_less() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def both_busy(worker: FakeWorker) -> None:
            if worker.index == 0:
                await forever()
            await gate.wait()

        fakes = Fakes(on_generate=both_busy)
        pool = await ready(fakes)
        waiting = [asyncio.create_task(pool.generate(PROMPT, n)) for n in (4, 4)]
        await until(lambda: len(fakes.work) == 2)
        await asyncio.sleep(0.05)  # late by now, both of them
        assert len(fakes.work) == 2
        gate.set()
        assert sorted([writer(w) for w in await asyncio.gather(*waiting)]) == [1, 1]
        assert hedges(pool) == (1, 1)
        pool.close()

    run(test())


def test_half_of_what_a_slow_worker_has_to_do_moves() -> None:
    async def test() -> None:
        async def slow(_: FakeWorker) -> None:
            if len(fakes.work) > 4:
                await forever()

        fakes = Fakes(on_generate=slow)
        pool = await ready(fakes)
        pool._slots[1].ready = False
        fakes.work.extend([(9, 9, 9)] * 4)
        waiting = [asyncio.create_task(pool.generate(PROMPT)) for _ in range(8)]
        await until(lambda: len(fakes.work) == 12)
        pool._slots[1].ready = True
        await pool._notify()
        await until(lambda: len(fakes.work) == 16)
        await asyncio.sleep(0.05)
        assert [index for index, *_ in fakes.work[12:]] == [1] * 4  # no more of them
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await idle(pool)
        pool.close()

    run(test())


@pytest.mark.faults("F17")
def test_nobody_is_asked_who_may_have_other_weights_and_no_answer_of_such_a_one_is_taken() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def until_told(_: FakeWorker) -> None:
            await gate.wait()

        async def new_weights_in_the_second(worker: FakeWorker) -> None:
            if worker.index == 0:
                await gate.wait()
            else:
                worker.version += 1

        fakes = Fakes(on_generate=until_told)
        pool = await ready(fakes)
        pool._slots[1].ready = False
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 1)
        await pool.deliver(weights(1))
        pool._slots[1].ready = True
        await pool._notify()
        await asyncio.sleep(0.05)
        assert len(fakes.work) == 1
        gate.set()
        assert writer(await call) == 0

        await pool.deliver(weights(2))
        gate.clear()
        fakes.on_generate = new_weights_in_the_second
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 3 and not pool._slots[1].calls)
        assert not call.done()
        gate.set()
        assert writer(await call) == 0
        assert hedges(pool) == (1, 0)
        await idle(pool)
        pool.close()

    run(test())


# --- losses and errors


def test_a_late_worker_that_is_lost_after_the_other_has_answered_is_nobodys_error() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def dies_late(worker: FakeWorker) -> None:
            if (worker.index, worker.generation) == (0, 0):
                await gate.wait()
                raise ActorDiedError()

        fakes = Fakes(on_generate=dies_late)
        pool = await ready(fakes)
        assert writer(await pool.generate(PROMPT)) == 1
        gate.set()
        await until(lambda: pool.counts() == {"lost": 1, "preempted": 0, "replaced": 1})
        await idle(pool)
        await until(lambda: [kind for kind, _ in fakes.told] == ["hedged", "worker_lost"])
        assert writer(await pool.generate(PROMPT)) == 0  # the replacement
        pool.close()

    run(test())


@pytest.mark.parametrize("second", ["answers", "dies"])
def test_a_late_worker_that_is_lost_while_the_other_is_at_work(second: str) -> None:
    """The other one's answer; and WorkerLost, once, if it is lost, too."""

    async def test() -> None:
        dead, gate = asyncio.Event(), asyncio.Event()

        async def hook(worker: FakeWorker) -> None:
            if worker.generation:
                return
            if worker.index == 0:
                await dead.wait()
                raise ActorDiedError()
            await gate.wait()
            if second == "dies":
                raise ActorDiedError()

        fakes = Fakes(on_generate=hook)
        pool = await ready(fakes)
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 2)
        dead.set()
        await until(lambda: pool.counts()["lost"] == 1)
        assert not call.done()
        gate.set()
        if second == "answers":
            assert writer(await call) == 1
            assert hedges(pool) == (1, 1)
        else:
            with pytest.raises(WorkerLost, match="rollout-0"):
                await call
            assert hedges(pool) == (1, 0)
        await until(lambda: pool.ready == 2)
        assert pool.counts()["lost"] == (1 if second == "answers" else 2)
        await idle(pool)
        pool.close()

    run(test())


@pytest.mark.parametrize("error", [ActorDiedError(), RayTaskError("generate", "", KeyError("oops"))])
def test_what_goes_wrong_with_the_second_is_not_the_callers_trouble(error: Exception) -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def second_fails(worker: FakeWorker) -> None:
            if worker.index:
                raise error
            await gate.wait()

        fakes = Fakes(on_generate=second_fails)
        pool = await ready(fakes)
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) >= 2)
        gate.set()
        assert writer(await call) == 0
        await idle(pool)
        pool.close()

    run(test())


def test_an_error_of_the_first_is_the_callers_at_once() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def first_fails(worker: FakeWorker) -> None:
            if worker.index:
                await forever()
            await gate.wait()
            raise RayTaskError("generate", "", DataError("RLKD-D603", "the prompt does not fit"))

        fakes = Fakes(on_generate=first_fails)
        pool = await ready(fakes)
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 2)
        gate.set()
        with pytest.raises(DataError, match="does not fit"):
            await call
        await moves(pool, fakes.made[1])
        assert pool.counts()["lost"] == 0
        pool.close()

    run(test())


def test_who_gives_up_waiting_leaves_nobody_at_work() -> None:
    async def test() -> None:
        stopped: list[int] = []
        never = asyncio.Event()  # held here: a task that nobody holds is ended by the garbage collector

        async def waits(worker: FakeWorker) -> None:
            try:
                await never.wait()
            finally:
                stopped.append(worker.index)

        fakes = Fakes(on_generate=waits)
        pool = await ready(fakes, timeout_s=1000.0)
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 2)
        call.cancel()
        await idle(pool)
        assert sorted(stopped) == [0, 1]
        assert call.cancelled()
        pool.close()

    run(test())


@pytest.mark.faults("F3")
@pytest.mark.parametrize("seed", range(20))
def test_each_call_has_one_end_and_nothing_is_left_whatever_happens(seed: int) -> None:
    """Three workers that are slow, die and fail as chance has it."""

    async def test() -> None:
        chance = random.Random(seed)

        async def anything(worker: FakeWorker) -> None:
            for _ in range(chance.choice([0, 1, 5, 60])):
                await asyncio.sleep(0.001)
                worker.tokens += 1
            if chance.random() < 0.1:
                raise ActorDiedError()

        fakes = Fakes(on_generate=anything)
        pool = await ready(fakes, 3, replacements=10**6, in_window=10**6, backoff_s=1e-9)
        ends = await asyncio.gather(
            *(pool.generate(PROMPT, chance.randint(1, 4)) for _ in range(60)), return_exceptions=True
        )
        assert {type(end) for end in ends} <= {list, WorkerLost}
        assert any(isinstance(end, list) for end in ends)
        await idle(pool)
        await until(lambda: pool.ready == 3 and not [t for t in pool._tasks if t.get_name().startswith("end of")])
        sent, won = hedges(pool)
        assert 0 <= won <= sent
        assert len(fakes.work) <= 60 + sent  # who dies just then is not asked any more
        assert pool.counts()["lost"] == len(fakes.killed)
        pool.close()

    run(test())


# --- the recipe


def pool_of(folder: Path, *overrides: str) -> Pool:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace('"tests.test_config_teachers:NAME"', "grpo"))
    config = load(path, overrides)
    read = object.__new__(Inputs)
    object.__setattr__(read, "tokenizer", SimpleNamespace(stop_tokens=(1,)))
    builder = _Builder(config, read, folder, lambda *_: None, AsyncExitStack())
    site: Any = SimpleNamespace(samplers=2, carrier=None)
    builder.site, builder.threads = site, Threads(1, 1, 1)
    return builder._policy()


def test_the_recipe_says_whether(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: Callable[..., Any] = lambda *said: pool_of(tmp_path, *said)._options.hedge  # noqa: E731
    assert options() == 3.0
    assert options("sampler.hedge=2") == 2.0
    assert options("sampler.hedge=null") is None
    assert options("deterministic=true") is None
    with pytest.raises(ConfigError, match=r"sampler\.hedge"):
        options("sampler.hedge=0.5")
