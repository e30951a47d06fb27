"""The pool of workers on fakes: who gets work, what a loss looks like from outside, what a replacement must show."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OwnerDiedError,
    RayTaskError,
    WorkerCrashedError,
)

from rlkd.core.errors import DataError, InfrastructureError, NoWorkers, PreflightError, WorkerLost
from rlkd.core.ports import Model, Sampling, WeightRef
from rlkd.core.types import Finish
from rlkd.workers.pool import Pool, PoolOptions
from tests.pool_fakes import PROMPT, QUICK, SAMPLING, Fakes, FakeWorker, dies, forever, run, until, weights


def test_it_is_a_model_and_holds_the_default_sampling() -> None:
    async def test() -> None:
        pool = Fakes().pool()
        assert isinstance(pool, Model)
        await pool.start()
        assert len((await pool.generate(PROMPT))[0].tokens) == SAMPLING.max_tokens
        assert len((await pool.generate(PROMPT, sampling=Sampling(max_tokens=9)))[0].tokens) == 9
        assert [len(x) for x in await pool.logp([PROMPT, PROMPT[:3]])] == [12, 3]
        assert await pool.abort() == 4
        pool.sampling = None
        with pytest.raises(ValueError, match="no default"):
            await pool.generate(PROMPT)
        pool.close()

    run(test())


def test_work_goes_to_the_worker_with_the_least_to_do() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(_: FakeWorker) -> None:
            await gate.wait()

        fakes = Fakes(on_generate=wait)
        pool = fakes.pool()
        await pool.start()
        calls = [asyncio.create_task(pool.generate(PROMPT, n)) for n in (8, 1, 1, 1, 1)]
        await until(lambda: len(fakes.work) == 5)
        assert [index for index, _, _ in fakes.work] == [0, 1, 1, 1, 1]  # 4 samples are less than 8
        gate.set()
        await asyncio.gather(*calls)
        await pool.generate(PROMPT, 1)
        assert fakes.work[-1][0] == 0  # nothing is left of the load of what is done
        pool.close()

    run(test())


def test_at_once_bounds_the_calls_on_one_worker() -> None:
    async def test() -> None:
        gate, under_way, most = asyncio.Event(), [0], [0]

        async def wait(_: FakeWorker) -> None:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            await gate.wait()
            under_way[0] -= 1

        fakes = Fakes(on_generate=wait)
        pool = fakes.pool(1, PoolOptions(at_once=2))
        await pool.start()
        calls = [asyncio.create_task(pool.generate(PROMPT)) for _ in range(7)]
        await until(lambda: under_way[0] == 2)
        gate.set()
        await asyncio.gather(*calls)
        assert most[0] == 2
        assert len(fakes.work) == 7
        pool.close()

    run(test())


LOSSES = [
    ActorDiedError(),
    ActorUnavailableError("gone for now", b"0" * 16),
    WorkerCrashedError(),
    NodeDiedError("node died"),
    ObjectLostError("00", None, ""),
    OwnerDiedError("00", None, ""),
    GetTimeoutError("late"),
    WorkerLost("VLLMEngine stopped"),
]


@pytest.mark.faults("F1", "F12")
@pytest.mark.parametrize("error", LOSSES, ids=lambda e: type(e).__name__)
def test_every_way_to_lose_a_worker_is_worker_lost_and_the_worker_is_replaced(error: Exception) -> None:
    async def test() -> None:
        async def fail(worker: FakeWorker) -> None:
            if worker.generation == 0:
                raise error

        fakes = Fakes(on_generate=fail)
        pool = fakes.pool(1)
        await pool.start()
        with pytest.raises(WorkerLost, match=r"rollout-0\.generate\(prompt 12, samples 3\)"):
            await pool.generate(PROMPT, 3)
        assert fakes.killed == fakes.made[:1]
        assert (await pool.generate(PROMPT))[0].finish == Finish.LENGTH  # waits for the replacement
        assert fakes.work[-1][:2] == (0, 1)
        assert pool.counts() == {"lost": 1, "preempted": 0, "replaced": 1}
        pool.close()

    run(test())


def test_errors_of_the_workers_code_are_not_losses() -> None:
    async def test() -> None:
        async def too_long(_: FakeWorker) -> None:
            raise RayTaskError("generate", "traceback", DataError("RLKD-D603", "the prompt does not fit"))

        async def bug(_: FakeWorker) -> None:
            raise RayTaskError("generate", "traceback", KeyError("oops"))

        fakes = Fakes(on_generate=too_long)
        pool = fakes.pool(1)
        await pool.start()
        with pytest.raises(DataError, match="does not fit"):
            await pool.generate(PROMPT)
        fakes.on_generate = bug
        with pytest.raises(RayTaskError):
            await pool.generate(PROMPT)
        assert pool.counts() == {"lost": 0, "preempted": 0, "replaced": 0}
        pool.close()

    run(test())


@pytest.mark.faults("F3")
def test_a_worker_that_does_not_answer_is_lost_after_its_time() -> None:
    async def test() -> None:
        async def hang(worker: FakeWorker) -> None:
            if worker.generation == 0:
                await forever()

        fakes = Fakes(on_generate=hang)
        pool = fakes.pool(1, PoolOptions(timeout_s=0.05))
        await pool.start()
        with pytest.raises(WorkerLost, match=r"rollout-0\.generate\(.*\): no answer within 0.05 s"):
            await pool.generate(PROMPT)
        assert fakes.killed == fakes.made[:1]
        await pool.generate(PROMPT)
        pool.close()

    run(test())


@pytest.mark.faults("F1")
def test_everybody_who_waits_for_a_lost_worker_hears_of_it_at_once() -> None:
    """One call finds out; the others need not wait for their own time to run out."""

    async def test() -> None:
        async def hang_or_die(worker: FakeWorker) -> None:
            if worker.generation == 0:
                if worker.generated == 3:
                    raise ActorDiedError()
                await forever()

        fakes = Fakes(on_generate=hang_or_die)
        pool = fakes.pool(1, PoolOptions(timeout_s=1000.0))
        await pool.start()
        calls = [pool.generate(PROMPT) for _ in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(r) for r in results] == [WorkerLost] * 3
        assert pool.counts()["lost"] == 1
        pool.close()

    run(test())


@pytest.mark.faults("F1")
def test_others_get_the_work_while_a_worker_is_replaced() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def slow_start(worker: FakeWorker) -> None:
            if worker.generation:
                await gate.wait()

        fakes = Fakes(on_start=slow_start, on_generate=dies(index=0))
        pool = fakes.pool(2)
        await pool.start()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        assert {(await pool.generate(PROMPT))[0].tokens[0] for _ in range(4)} == {1}
        gate.set()
        await until(lambda: pool.counts()["replaced"] == 1)
        await pool.generate(PROMPT)
        assert fakes.work[-1][:2] == (0, 1)
        pool.close()

    run(test())


@pytest.mark.faults("F1", "F17")
def test_a_replacement_has_the_current_weights_before_it_gets_work() -> None:
    async def test() -> None:
        fakes = Fakes()
        pool = fakes.pool(2)
        await pool.start()
        await pool.deliver(weights(1))
        await pool.deliver(weights(2))
        fakes.on_generate = dies(index=1)
        for _ in range(2):
            calls = [pool.generate(PROMPT), pool.generate(PROMPT)]
            await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: pool.counts()["replaced"] == 1)
        assert (fakes.made[-1].version, fakes.made[-1].digest) == (2, "digest-2")
        await asyncio.gather(pool.generate(PROMPT), pool.generate(PROMPT))
        assert {version for _, _, version in fakes.work} == {2}
        pool.close()

    run(test())


@pytest.mark.faults("F17")
@pytest.mark.parametrize("checked", [True, False])
def test_a_replacement_with_stale_weights_gets_no_work(checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that says it loaded but still has other weights; without the handshake (control) it would be used."""

    async def test() -> None:
        async def forget(worker: FakeWorker) -> None:
            if worker.generation == 1:
                worker.version, worker.digest = 0, ""

        async def trust(_: Pool, slot: Any, ref: WeightRef) -> None:
            await slot.handle.load.remote(ref)
            await slot.handle.status.remote()

        if not checked:
            monkeypatch.setattr(Pool, "_hand_over", trust)
        fakes = Fakes(on_status=forget)
        pool = fakes.pool(1)
        await pool.start()
        await pool.deliver(weights(5))
        fakes.on_generate = dies()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        version = (await pool.generate(PROMPT))[0].versions[0]
        assert version == (5 if checked else 0)
        assert len(fakes.made) == (3 if checked else 2)  # the liar was replaced too
        pool.close()

    run(test())


@pytest.mark.faults("F17")
def test_weights_delivered_while_a_replacement_starts_reach_it_too() -> None:
    async def test() -> None:
        loading, gate = asyncio.Event(), asyncio.Event()

        async def slow(worker: FakeWorker, ref: WeightRef) -> None:
            if worker.generation and ref.version == 1:
                loading.set()
                await gate.wait()

        fakes = Fakes(on_load=slow, on_generate=dies(index=0))
        pool = fakes.pool(2)
        await pool.start()
        await pool.deliver(weights(1))
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        await loading.wait()
        await pool.deliver(weights(2))
        gate.set()
        await until(lambda: pool.counts()["replaced"] == 1)
        assert fakes.made[-1].version == 2
        pool.close()

    run(test())


def test_a_replacement_is_not_blamed_for_a_version_overwritten_while_it_loaded() -> None:
    async def test() -> None:
        loading, gate = asyncio.Event(), asyncio.Event()

        async def overwritten(worker: FakeWorker, ref: WeightRef) -> None:
            if worker.generation and ref.version == 1:
                loading.set()
                await gate.wait()
                raise RayTaskError("load", "traceback", InfrastructureError("RLKD-I601", "version 3 is in their place"))

        fakes = Fakes(on_load=overwritten, on_generate=dies(index=0))
        pool = fakes.pool(2)
        await pool.start()
        await pool.deliver(weights(1))
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        await loading.wait()
        await pool.deliver(weights(2))
        gate.set()
        await until(lambda: pool.counts()["replaced"] == 1)
        assert fakes.made[-1].version == 2
        assert len(fakes.made) == 3
        pool.close()

    run(test())


@pytest.mark.faults("F18")
def test_who_does_not_acknowledge_is_removed_and_its_replacement_has_the_weights() -> None:
    """All or nothing: after deliver no worker with work has other weights, whatever went wrong on the way."""

    async def test() -> None:
        async def fail(worker: FakeWorker, ref: WeightRef) -> None:
            if ref.version == 2 and worker.generation == 0 and worker.index < 3:
                if worker.index == 0:
                    raise ActorDiedError()
                if worker.index == 1:
                    await forever()
                raise RayTaskError("load", "traceback", InfrastructureError("RLKD-I601", "damaged"))

        fakes = Fakes(on_load=fail)
        pool = fakes.pool(4, PoolOptions(sync_s=0.05))
        await pool.start()
        await pool.deliver(weights(1))
        assert pool.version == 1
        await pool.deliver(weights(2))
        assert pool.version == 2
        assert {w.index for w in fakes.killed} == {0, 1, 2}
        await until(lambda: pool.counts()["replaced"] == 3)
        await asyncio.gather(*(pool.generate(PROMPT) for _ in range(4)))
        assert {version for _, _, version in fakes.work} == {2}
        assert {index for index, _, _ in fakes.work} == {0, 1, 2, 3}
        pool.close()

    run(test())


def test_the_only_worker_lost_in_a_delivery_is_replaced_before_it_returns() -> None:
    async def test() -> None:
        async def die(worker: FakeWorker, ref: WeightRef) -> None:
            if ref.version == 2 and worker.generation == 0:
                raise ActorDiedError()

        fakes = Fakes(on_load=die)
        pool = fakes.pool(1)
        await pool.start()
        await pool.deliver(weights(1))
        await pool.deliver(weights(2))
        assert (pool.version, fakes.made[-1].version) == (2, 2)
        pool.close()

    run(test())


def test_weights_nobody_can_load_end_the_run() -> None:
    async def test() -> None:
        async def damaged(_: FakeWorker, ref: WeightRef) -> None:
            if ref.version == 2:
                raise RayTaskError("load", "traceback", InfrastructureError("RLKD-I601", "their bytes are damaged"))

        fakes = Fakes(on_load=damaged)
        pool = fakes.pool(2)
        await pool.start()
        await pool.deliver(weights(1))
        with pytest.raises(InfrastructureError, match="times in a row") as caught:
            await pool.deliver(weights(2))
        assert "their bytes are damaged" in str(caught.value)
        assert pool.version == 1
        with pytest.raises(InfrastructureError):
            await pool.generate(PROMPT)
        pool.close()

    run(test())


@pytest.mark.faults("F16")
def test_the_budget_of_replacements() -> None:
    """Three replacements without an answer in between, then InfrastructureError for everybody who waits."""

    async def test() -> None:
        async def die(_: FakeWorker) -> None:
            raise ActorDiedError()

        fakes = Fakes(on_generate=die)
        pool = fakes.pool(1)
        await pool.start()
        for _ in range(3):
            with pytest.raises(WorkerLost):
                await pool.generate(PROMPT)
        with pytest.raises(InfrastructureError, match="rollout-0 was lost 4 times in a row") as caught:
            await pool.generate(PROMPT)
        assert caught.value.exit_code == 6
        assert len(fakes.made) == 4
        with pytest.raises(InfrastructureError):
            await pool.generate(PROMPT)
        pool.close()

    run(test())


def test_without_replacements_the_first_loss_of_the_last_worker_ends_it() -> None:
    async def test() -> None:
        fakes = Fakes(on_generate=dies(generation=0))
        pool = fakes.pool(2, replace(QUICK, replacements=0))
        await pool.start()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        with pytest.raises(NoWorkers, match="lost, and is not to be replaced"):
            await pool.generate(PROMPT)
        assert len(fakes.made) == 2
        pool.close()

    run(test())


@pytest.mark.parametrize("patient", [True, False])
def test_a_call_while_all_are_being_replaced_waits_or_is_lost_at_once(patient: bool) -> None:
    async def test() -> None:
        back = asyncio.Event()

        async def starts(worker: FakeWorker) -> None:
            if worker.generation:
                await back.wait()

        fakes = Fakes(on_start=starts, on_generate=dies(generation=0))
        pool = fakes.pool(1, replace(QUICK, patient=patient, timeout_s=60.0, start_s=60.0))
        await pool.start()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        call = asyncio.create_task(pool.generate(PROMPT))
        if patient:
            await until(lambda: len(fakes.made) == 2)
            assert not call.done()
        else:
            with pytest.raises(WorkerLost, match="rollout: rollout-0 is"):
                await call
        back.set()
        await until(lambda: pool.ready == 1)
        await (call if patient else pool.generate(PROMPT))
        pool.close()

    run(test())


def test_an_impatient_pool_waits_for_a_worker_that_is_busy() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(_: FakeWorker) -> None:
            await gate.wait()

        fakes = Fakes(on_generate=wait)
        pool = fakes.pool(1, replace(QUICK, patient=False, at_once=1))
        await pool.start()
        calls = [asyncio.create_task(pool.generate(PROMPT)) for _ in range(3)]
        await until(lambda: len(fakes.work) == 1)
        gate.set()
        assert len(await asyncio.gather(*calls)) == 3
        pool.close()

    run(test())


def test_an_answer_renews_the_budget() -> None:
    async def test() -> None:
        async def every_third(worker: FakeWorker) -> None:
            if worker.generated == 2:
                raise ActorDiedError()

        fakes = Fakes(on_generate=every_third)
        pool = fakes.pool(1)
        await pool.start()
        for _ in range(10):
            await pool.generate(PROMPT)
            with pytest.raises(WorkerLost):
                await pool.generate(PROMPT)
        assert pool.counts()["lost"] == 10
        pool.close()

    run(test())


def test_waiting_calls_end_when_the_budget_is_spent() -> None:
    async def test() -> None:
        async def die_later(worker: FakeWorker) -> None:
            if worker.generation:
                raise ActorDiedError()

        fakes = Fakes(on_start=die_later, on_generate=dies())
        pool = fakes.pool(1)
        await pool.start()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        calls = [pool.generate(PROMPT) for _ in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(r) for r in results] == [NoWorkers] * 3
        assert len(fakes.made) == 4
        pool.close()

    run(test())


def test_what_a_start_explains_is_raised_as_it_is() -> None:
    async def test() -> None:
        async def no_model(_: FakeWorker) -> None:
            raise RayTaskError("start", "traceback", PreflightError("RLKD-E601", "the model cannot be loaded"))

        fakes = Fakes(on_start=no_model)
        pool = fakes.pool(2)
        with pytest.raises(PreflightError, match="cannot be loaded"):
            await pool.start()
        assert len(fakes.made) == len(fakes.killed) == 2

        crashing = Fakes(on_start=dies())
        pool = crashing.pool(2)
        await pool.start()  # a crash is not an explanation: tried again
        assert len(crashing.made) == 4
        pool.close()

    run(test())


def test_a_bug_in_a_replacement_reaches_the_next_caller() -> None:
    async def test() -> None:
        async def bug(worker: FakeWorker) -> None:
            if worker.generation:
                raise KeyError("oops")

        fakes = Fakes(on_start=bug, on_generate=dies())
        pool = fakes.pool(1)
        await pool.start()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        with pytest.raises(InfrastructureError, match="oops"):
            await pool.generate(PROMPT)
        pool.close()

    run(test())


@pytest.mark.faults("F3")
def test_a_stuck_worker_is_found_although_nobody_waits_for_it() -> None:
    async def test() -> None:
        async def hang(worker: FakeWorker) -> None:
            if worker.generation == 0 and worker.index == 1:
                await forever()

        fakes = Fakes(on_status=hang)
        pool = fakes.pool(2, PoolOptions(probe_s=0.02))
        await pool.start()
        await until(lambda: pool.counts()["replaced"] == 1)
        assert [w.index for w in fakes.killed] == [1]
        pool.close()

    run(test())


def test_a_cancelled_call_leaves_no_load_behind() -> None:
    async def test() -> None:
        async def hang(worker: FakeWorker) -> None:
            if worker.generated == 1:
                await forever()

        fakes = Fakes(on_generate=hang)
        pool = fakes.pool(1, PoolOptions(at_once=1))
        await pool.start()
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await pool.generate(PROMPT)
        assert pool.counts()["lost"] == 0
        pool.close()

    run(test())


def test_close_kills_all_workers_and_ends_all_calls() -> None:
    async def test() -> None:
        async def hang(_: FakeWorker) -> None:
            await forever()

        fakes = Fakes(on_generate=hang)
        pool = fakes.pool(3)
        await pool.start()
        calls = [asyncio.create_task(pool.generate(PROMPT)) for _ in range(3)]
        await until(lambda: len(fakes.work) == 3)
        pool.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(r) for r in results} <= {WorkerLost, NoWorkers}
        assert {w.index for w in fakes.killed} == {0, 1, 2}
        assert len(fakes.made) == 3

    run(test())
