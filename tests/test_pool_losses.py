"""What a pool does about workers that are stuck, run out of memory, flap, or live on nodes that go away; on fakes."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

from rlkd.core.errors import (
    INFRASTRUCTURE,
    RESUBMIT,
    InfrastructureError,
    NodesGone,
    NoWorkers,
    WorkerLost,
)
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import Finish
from rlkd.engines.jobs import EngineOptions
from rlkd.engines.vllm import VLLMEngine
from rlkd.workers.losses import Kind, Losses, Progress, kind_of
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.vitals import Memory, Place, memory
from tests.pool_fakes import PROMPT, QUICK, Fakes, FakeWorker, dies, forever, nothing, run, until, weights

WATCHED = PoolOptions(timeout_s=1000.0, probe_s=5.0, stall_s=0.08, backoff_s=0.001)
FULL = Memory(20 * 2**30, 24 * 2**30, 24 * 2**30)


async def writes_nothing(worker: FakeWorker) -> None:
    """The first worker 0 takes work and never writes a token."""
    if (worker.index, worker.generation) == (0, 0):
        await forever()


# --- stuck


@pytest.mark.faults("F2", "F3", "F20")
def test_a_worker_with_work_that_writes_no_token_is_lost_long_before_its_deadline() -> None:
    async def test() -> None:
        fakes, taken = Fakes(on_generate=writes_nothing), []

        async def stacks(name: str, place: Place) -> str:
            taken.append((name, place.pid))
            return "stacks in there"

        pool = fakes.pool(1, WATCHED)
        pool._stacks = stacks
        await pool.start()
        with pytest.raises(WorkerLost, match=r"rollout-0: no progress for .* s with 1 calls under way"):
            await pool.generate(PROMPT)
        assert fakes.killed == fakes.made[:1]
        assert taken == [("rollout-0", 1001)]
        assert any(
            kind == "stalled" and "stacks in there; it is killed and replaced" in text for kind, text in fakes.told
        )
        await pool.generate(PROMPT)
        pool.close()

    run(test())


@pytest.mark.faults("F3")
def test_who_is_slow_but_writes_is_left_alone_and_so_is_who_has_nothing_to_do() -> None:
    """And without the watch (control) the stuck one would be waited for until the call's own deadline."""

    async def test() -> None:
        async def slowly(worker: FakeWorker) -> None:
            for _ in range(12):
                await asyncio.sleep(0.02)
                worker.tokens += 1

        slow = Fakes(on_generate=slowly)
        pool = slow.pool(2, WATCHED)
        await pool.start()
        await pool.generate(PROMPT)  # longer than stall_s, while the other one idles
        assert pool.counts()["lost"] == 0
        pool.close()

        stuck = Fakes(on_generate=writes_nothing)
        pool = stuck.pool(1, PoolOptions(timeout_s=1000.0, probe_s=0.02))
        await pool.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.generate(PROMPT), 0.4)
        pool.close()

    run(test())


@pytest.mark.faults("F3", "F7")
def test_so_it_is_with_one_that_scores() -> None:
    """Layer by layer its counter grows (tests/test_scorer.py), long before the call is over."""

    async def test() -> None:
        async def layer_by_layer(worker: FakeWorker) -> None:
            for _ in range(12):
                await asyncio.sleep(0.02)
                worker.tokens += 1

        fakes = Fakes(on_logp=layer_by_layer)
        pool = fakes.pool(1, WATCHED)
        await pool.start()
        await pool.logp([PROMPT])
        assert pool.counts()["lost"] == 0
        fakes.on_logp = writes_nothing
        with pytest.raises(WorkerLost, match=r"rollout-0: no progress for .* s with 1 calls under way"):
            await pool.logp([PROMPT])
        pool.close()

    run(test())


def test_loading_weights_is_not_a_stall() -> None:
    async def test() -> None:
        async def slow_load(worker: FakeWorker, _: WeightRef) -> None:
            await asyncio.sleep(0.3)
            worker.tokens += 1

        async def until_loaded(worker: FakeWorker) -> None:
            await until(lambda: worker.version == 1)

        fakes = Fakes(on_load=slow_load, on_generate=until_loaded)
        pool = fakes.pool(1, WATCHED)
        await pool.start()
        call = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 1)
        await pool.deliver(weights(1))
        await call
        assert pool.counts()["lost"] == 0
        pool.close()

    run(test())


def test_progress() -> None:
    p = Progress()
    p.begin(100.0)
    assert p.seen(0, True, 130.0) == 30.0
    assert p.seen(5, True, 140.0) == 0.0
    assert p.seen(5, True, 150.0) == 10.0
    assert p.seen(5, False, 200.0) == 0.0  # nothing to do
    p.begin(210.0)
    assert p.seen(5, True, 215.0) == 5.0


# --- memory


def lost(text: str, cause: BaseException | None = None) -> WorkerLost:
    error = WorkerLost(text)
    error.__cause__ = cause
    return error


def died(how: str) -> ActorDiedError:
    """In Ray's words (tests/cluster/test_sigterm.py has them from a real node)."""
    error = ActorDiedError()
    error.error_msg = f"The actor died because its node has died. Node Id: 465a\n\tthe actor's node was {how}"
    return error


@pytest.mark.faults("F4", "F13")
@pytest.mark.parametrize(
    ("error", "known", "kind"),
    [
        (lost("rollout-0.generate(): ActorDiedError", ActorDiedError()), {}, Kind.INFRA),
        (lost("rollout-0.generate(): ActorDiedError", ActorDiedError()), {"memory_full": True}, Kind.MEMORY),
        (lost("rollout-0.generate(): …", ActorUnavailableError("late", b"0" * 16)), {"memory_full": True}, Kind.MEMORY),
        (lost("rollout-0.generate(): no answer within 5 s"), {"memory_full": True}, Kind.INFRA),
        (lost("x", OutOfMemoryError("the node was low on memory")), {}, Kind.MEMORY),
        (lost("VLLMEngine stopped: MemoryError: "), {}, Kind.MEMORY),
        (lost("HFEngine stopped: RuntimeError: DefaultCPUAllocator: can't allocate memory: …"), {}, Kind.MEMORY),
        (lost("VLLMEngine stopped: OutOfMemoryError: CUDA out of memory."), {}, Kind.MEMORY),
        (lost("x", ActorDiedError()), {"draining": True, "memory_full": True}, Kind.PREEMPT),
        (lost("x", died("terminated expectedly: received SIGTERM")), {"memory_full": True}, Kind.PREEMPT),
        (lost("x", died("terminated unexpectedly: health check failed")), {}, Kind.INFRA),
    ],
)
def test_why_a_worker_was_lost(error: WorkerLost, known: dict[str, bool], kind: Kind) -> None:
    assert kind_of(error, **known) is kind


def test_rays_guess_at_every_sudden_death_is_not_taken_for_a_lack_of_memory() -> None:
    from rlkd.workers.ask import _said

    text = (
        "The actor died unexpectedly before finishing this task.\n"
        "The actor is dead because its worker process has died. "
        "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. "
        "End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage"
    )
    error = ActorDiedError()
    error.error_msg = text
    assert kind_of(lost(_said(error), error)) is Kind.INFRA


@pytest.mark.faults("F4")
def test_out_of_memory_twice_in_a_row_ends_the_run_and_names_the_settings() -> None:
    async def test() -> None:
        async def too_much(worker: FakeWorker) -> None:
            if worker.generated % 2 == 0:  # an answer in between does not make it better
                raise ActorDiedError()

        fakes = Fakes(on_generate=too_much, memory=FULL)
        pool = fakes.pool(1, PoolOptions(probe_s=0.005, backoff_s=0.001))
        await pool.start()
        await until(lambda: pool._slots[0].vitals is not None)
        await pool.generate(PROMPT)
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        await pool.generate(PROMPT)
        await until(lambda: pool._slots[0].vitals is not None)
        with pytest.raises(InfrastructureError) as caught:
            await pool.generate(PROMPT)
        said = str(caught.value)
        assert "RLKD-I612" in said
        assert "rollout-0 ran out of memory twice in a row" in said
        assert "20.0 GiB of its own, 24.0 of 24.0 GiB in use" in said
        assert "lower sampler.max_num_seqs or sampler.kv_cache_gib" in said
        assert caught.value.exit_code == INFRASTRUCTURE
        assert len(fakes.made) == 2
        pool.close()

    run(test())


def test_memory_is_read_from_the_system() -> None:
    found = memory()
    assert 0 < found.own < found.limit
    assert 0 < found.used <= found.limit


# --- flapping


@pytest.mark.faults("F16")
def test_a_flapping_worker_is_taken_out_and_the_others_go_on() -> None:
    """It answers between its losses, so that no row of losses ever gets long."""

    async def test() -> None:
        async def every_second(worker: FakeWorker) -> None:
            if worker.index == 0 and worker.generated == 2:
                raise ActorDiedError()

        fakes = Fakes(on_generate=every_second)
        pool = fakes.pool(2, PoolOptions(backoff_s=0.001, in_window=4))
        await pool.start()
        for _ in range(60):
            await asyncio.gather(pool.generate(PROMPT), pool.generate(PROMPT), return_exceptions=True)
            await asyncio.sleep(0)
        assert sum(w.index == 0 for w in fakes.made) == 5
        assert pool._slots[0].out == "is out: lost 5 times within 600 s"
        assert any(kind == "quarantine" and "1 of 2 go on" in text for kind, text in fakes.told)
        assert (await pool.generate(PROMPT))[0].tokens[0] == 1
        pool.close()

    run(test())


def test_the_window_forgets() -> None:
    """Control: without the window's end the eleventh loss of a long run would take the worker out."""
    long = Losses(replacements=3, window_s=60.0, in_window=2)
    for hour in range(20):
        assert long.charge(Kind.INFRA, hour * 3600.0) is None
        long.answered()
    short = Losses(replacements=3, window_s=60.0, in_window=2)
    verdicts = []
    for second in range(3):
        verdicts.append(short.charge(Kind.INFRA, float(second)))
        short.answered()
    assert verdicts == [None, None, "lost 3 times within 60 s"]


@pytest.mark.faults("F16")
def test_pauses_between_replacements_double() -> None:
    losses, pauses = Losses(replacements=9), []
    for _ in range(5):
        losses.charge(Kind.INFRA, 0.0)
        pauses.append(losses.pause_s(1.0))
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0]


# --- nobody left


@pytest.mark.faults("F5")
def test_without_any_worker_it_waits_says_so_and_gives_up() -> None:
    async def test() -> None:
        async def never_again(worker: FakeWorker) -> None:
            if worker.generation:
                await forever()

        fakes = Fakes(on_start=never_again, on_generate=dies())
        pool = fakes.pool(2, PoolOptions(start_s=1000.0, nobody_s=0.3, status_s=0.1))
        await pool.start()
        calls = [pool.generate(PROMPT) for _ in range(2)]
        assert {type(r) for r in await asyncio.gather(*calls, return_exceptions=True)} == {WorkerLost}
        with pytest.raises(NoWorkers, match=r"RLKD-I613.*rollout: no worker for .* s: rollout-0 is starting") as caught:
            await pool.generate(PROMPT)
        assert caught.value.exit_code == INFRASTRUCTURE
        waits = [text for kind, text in fakes.told if kind == "waiting"]
        assert "giving up after 0.3 s" in waits[0]
        assert len(waits) <= 3  # not at every look
        pool.close()

    run(test())


@pytest.mark.faults("F5", "F12", "F13", "F15")
def test_when_all_nodes_went_away_the_exit_code_asks_to_be_resubmitted() -> None:
    async def test() -> None:
        async def never_again(worker: FakeWorker) -> None:
            if worker.generation:
                await forever()

        fakes = Fakes(on_start=never_again, on_generate=dies(), draining={"node-0"})
        pool = fakes.pool(1, PoolOptions(start_s=1000.0, nobody_s=0.05))
        await pool.start()
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        with pytest.raises(NodesGone) as caught:
            await pool.generate(PROMPT)
        assert caught.value.exit_code == RESUBMIT
        pool.close()

    run(test())


# --- nodes that go away


@pytest.mark.faults("F10", "F12", "F13")
@pytest.mark.parametrize("known", [True, False])
def test_losses_on_a_node_that_was_draining_are_not_charged(known: bool) -> None:
    """Also when Ray does not say `preempted`, as after SIGTERM. Not remembering (control) spends the budget."""

    async def test() -> None:
        async def die(_: FakeWorker) -> None:
            raise ActorDiedError()

        fakes = Fakes(on_generate=die, node_of=lambda _: "spot")
        fakes.draining |= {"spot"} if known else set()
        pool = fakes.pool(1)
        await pool.start()
        for _ in range(6 if known else 3):
            with pytest.raises(WorkerLost):
                await pool.generate(PROMPT)
        if known:
            assert pool.counts()["preempted"] == pool.counts()["lost"] == 6
        else:
            with pytest.raises(NoWorkers):
                await pool.generate(PROMPT)
        pool.close()

    run(test())


@pytest.mark.faults("F10")
def test_leaving_a_node_lets_calls_end_and_moves_the_worker() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(worker: FakeWorker) -> None:
            if worker.generation == 0:
                await gate.wait()

        fakes = Fakes(on_generate=wait)
        pool = fakes.pool(1)
        await pool.start()
        await pool.deliver(weights(3))
        running = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 1)
        assert pool.leave("another", 1.0) == 0
        assert pool.leave("node-0", 1000.0) == 1
        assert pool.leave("node-0", 1000.0) == 0  # told twice, moved once
        await pool.generate(PROMPT)
        assert fakes.work[-1] == (0, 1, 3)  # elsewhere, with the current weights, while the old one still writes
        assert fakes.killed == []
        assert not running.done()
        gate.set()
        assert (await running)[0].finish == Finish.LENGTH
        await until(lambda: len(fakes.killed) == 1)
        assert fakes.killed == fakes.made[:1]
        assert pool.counts() == {"lost": 0, "preempted": 1, "replaced": 1}
        pool.close()

    run(test())


@pytest.mark.faults("F10")
def test_who_has_not_finished_when_the_node_goes_is_worker_lost() -> None:
    async def test() -> None:
        async def hang(worker: FakeWorker) -> None:
            if worker.generation == 0:
                await forever()

        fakes = Fakes(on_generate=hang)
        pool = fakes.pool(1)
        await pool.start()
        running = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: len(fakes.work) == 1)
        pool.leave("node-0", 0.05)
        with pytest.raises(WorkerLost, match="its node goes away, and 1 calls did not end in time"):
            await running
        assert pool.counts()["lost"] == 0
        await pool.generate(PROMPT)
        pool.close()

    run(test())


def test_the_roster_says_who_is_where_and_how_far() -> None:
    async def test() -> None:
        async def hang(_: FakeWorker) -> None:
            await forever()

        fakes = Fakes(on_generate=hang)
        pool = fakes.pool(2, PoolOptions(probe_s=0.01))
        await pool.start()
        running = asyncio.create_task(pool.generate(PROMPT))
        await until(lambda: all(s.vitals is not None for s in pool._slots))
        rows = pool.roster()
        assert list(rows) == ["rollout-0", "rollout-1"]
        busy, idle = rows["rollout-0"], rows["rollout-1"]
        assert (busy["calls"], idle["calls"], busy["state"]) == (1, 0, "is ready")
        assert busy["pid"] == 1002  # both were made before the first was asked
        assert busy["idle_s"] >= 0
        assert idle["idle_s"] is None
        running.cancel()
        pool.close()

    run(test())


# --- what comes back


@pytest.mark.faults("F53")
def test_tokens_without_their_log_probs_are_not_taken() -> None:
    async def test() -> None:
        fakes = Fakes()
        pool = fakes.pool(1)
        await pool.start()

        async def wrong(*_: Any) -> list[Completion]:
            return [Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), Finish.STOP, (0, 0)), Short()]

        class Short:
            tokens, logp = np.zeros(4, np.int32), np.zeros(3, np.float32)

        fakes.made[0].__class__ = type("Liar", (FakeWorker,), {"do_generate": wrong})
        with pytest.raises(InfrastructureError, match="a sample of 4 tokens came with 3 log-probs"):
            await pool.generate(PROMPT)
        pool.close()

    run(test())


@pytest.mark.faults("F18")
@pytest.mark.parametrize("protected", [True, False])
def test_a_worker_that_failed_to_load_writes_nothing(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its removal (control) it would write with the old weights."""

    async def test() -> None:
        async def fail(worker: FakeWorker, _: WeightRef) -> None:
            if (worker.index, worker.generation) == (1, 0):
                raise ActorDiedError()

        if not protected:
            monkeypatch.setattr(Pool, "_lose", lambda *_: None)
        fakes = Fakes(on_load=fail)
        pool = fakes.pool(2)
        await pool.start()
        await pool.deliver(weights(1))
        await asyncio.gather(*(pool.generate(PROMPT) for _ in range(4)))
        if protected:
            assert {version for _, _, version in fakes.work} == {1}
        else:
            assert {version for _, _, version in fakes.work} == {0, 1}
        pool.close()

    run(test())


@pytest.mark.faults("F19")
def test_every_worker_reads_the_canary_and_a_lost_one_is_left_out() -> None:
    async def test() -> None:
        fakes = Fakes()
        pool = fakes.pool(3)
        await pool.start()
        await pool.deliver(weights(2))
        found = await pool.canary(PROMPT)
        assert list(found) == ["rollout-0", "rollout-1", "rollout-2"]
        assert {float(r.logp[0]) for r in found.values()} == {-2.0}

        async def dead(*_: Any) -> None:
            raise ActorDiedError()

        fakes.made[1].__class__ = type("Dead", (FakeWorker,), {"do_canary": dead})
        assert list(await pool.canary(PROMPT)) == ["rollout-0", "rollout-2"]
        await until(lambda: pool.counts()["replaced"] == 1)
        pool.close()

    run(test())


def test_options_that_watch_nothing_start_no_watch() -> None:
    async def test() -> None:
        pool = Fakes(on_status=nothing).pool(1, QUICK)
        await pool.start()
        assert [t.get_name() for t in pool._tasks] == ["count rollout"]
        assert (await pool.generate(PROMPT, sampling=Sampling(max_tokens=2)))[0].tokens.tolist() == [0, 0]
        pool.close()

    run(test())


@pytest.mark.faults("F2")
@pytest.mark.parametrize("failed", [True, False])
def test_a_lost_process_of_tensor_parallel_shows_in_the_status(failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself only marks its executor; the call that is under way would wait on."""
    monkeypatch.setattr("rlkd.engines.vllm.prepare", lambda _: None)
    engine = VLLMEngine(EngineOptions("nowhere"))
    engine._engine = SimpleNamespace(model_executor=SimpleNamespace(is_failed=failed))
    if failed:
        with pytest.raises(WorkerLost, match=r"a process of sampler\.tensor_parallel ended"):
            engine.status()
    else:
        assert engine.status() == (0, "", 0)


def test_who_is_lost_between_two_steps_of_a_call_is_worker_lost_and_no_bug() -> None:
    """A look, a delivery or an abort may find the place empty; without the check (control) that ended the run."""

    async def test() -> None:
        fakes = Fakes(on_start=dies(generation=1))
        pool = fakes.pool(1)
        await pool.start()
        slot = pool._slots[0]
        pool._lose(slot, slot.handle, WorkerLost("rollout-0: gone"))
        await pool._look_at(slot, 1.0)
        await pool._deliver_to(slot, weights(1))
        assert await pool._abort_one(slot) == 0
        await until(lambda: slot.ready)
        assert pool.counts()["lost"] == 2  # itself, and its first replacement
        pool.close()

    run(test())


@pytest.mark.faults("F10")
def test_who_gets_its_weights_when_its_node_goes_has_one_successor() -> None:
    """It has a place, and no work yet: its own start must not go on in the seat that another one has by then."""

    async def test() -> None:
        gate = asyncio.Event()

        async def slow(worker: FakeWorker, _: object) -> None:
            if worker.generation == 1:
                await gate.wait()

        fakes = Fakes(on_load=slow, on_generate=dies())
        pool = fakes.pool(1)
        await pool.start()
        await pool.deliver(weights(1))
        with pytest.raises(WorkerLost):
            await pool.generate(PROMPT)
        await until(lambda: len(fakes.made) == 2 and pool._slots[0].place is not None)
        assert pool.leave("node-1", 1000.0) == 1
        gate.set()
        await until(lambda: pool.ready == 1)
        await pool.generate(PROMPT)
        await asyncio.sleep(0.05)
        assert [w.generation for w in fakes.made] == [0, 1, 2]
        assert fakes.killed == fakes.made[:2]
        assert fakes.work[-1] == (0, 2, 1)
        assert pool.counts()["lost"] == 1
        pool.close()

    run(test())
