"""Real actors that are killed, stopped, or never start; nodes that go away; a full object store."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from rlkd.algorithms.grpo import GRPO
from rlkd.core.errors import InfrastructureError, NoWorkers, WorkerLost
from rlkd.core.ports import Sampling, Services, WeightRef
from rlkd.core.types import Prompt, Sample
from rlkd.engines.weights import Publisher
from rlkd.models.get import get
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import find, pack
from rlkd.rollout import Sampled
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop, Schedule
from rlkd.why_stuck import why_stuck
from rlkd.workers.ask import call
from rlkd.workers.placement import Bundle, reserve
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.reward import ATTEMPTS, RewardPool, WorkerOptions
from rlkd.workers.rollout import spawner
from rlkd.workers.roster import Roster
from tests.engine_checks import random_llama, shake
from tests.fakes import FakeCurriculum, FakeLearner, FakePolicy, FakeReport, FakeVerify, numbered

pytestmark = pytest.mark.stack

TOY = "tests.toy_engine:Toy"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}
STEPS, GROUPS = 4, 3


@pytest.fixture
def ray_here() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


def run(test: Coroutine[Any, Any, Any], seconds: float = 150) -> Any:
    return asyncio.run(asyncio.wait_for(test, seconds))


def toys(seconds: float = 0.0, actor: Callable[[int], dict[str, Any]] = lambda _: {}, **environment: str) -> Any:
    return spawner(TOY, {"seconds": seconds}, {**ENVIRONMENT, **environment}, actor)


# --- in a run of the loop


def small(prompt: Prompt) -> Prompt:
    """Its tokens made to fit the small model's vocabulary: prompt i begins with token i."""
    prompt.tokens[0] -= 1000
    return prompt


class Numbered(FakeCurriculum):
    def draw(self) -> Prompt:
        return small(super().draw())


class ByName(dict[str, Prompt]):
    def __missing__(self, key: str) -> Prompt:
        return small(numbered(int(key[1:])))


@dataclass
class Publishing(FakeLearner):
    """Trains nothing, but gives every sampler other weights after each step."""

    pool: Any = None
    model: Any = None
    publisher: Any = None
    after: Callable[[int], None] = lambda _: None
    digests: dict[int, str] = field(default_factory=dict)

    async def publish(self, version: int) -> None:
        if version:
            shake(self.model, seed=version)
        ref: WeightRef = self.publisher.publish(version, self.model.named_parameters())
        self.digests[version] = ref.digest
        await self.pool.deliver(ref)
        self.after(version)


@pytest.mark.chaos
@pytest.mark.faults("F1", "F3", "F17")
@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(("engine", "number"), [("vllm", signal.SIGKILL), ("hf", signal.SIGSTOP)])
def test_a_worker_lost_in_the_middle_of_a_run_changes_nothing_about_what_is_trained(
    tmp_path: Path, engine: str, number: int
) -> None:
    """Every prompt once and in order, whole groups only, each written with the weights of its step."""
    model = random_llama(tmp_path / "model", tied=False)
    publisher = Publisher(str(tmp_path / "weights"))
    options = {"path": str(tmp_path / "model"), "dtype": "float32", "kv_cache_gib": 0.125, "max_num_seqs": 16,
               "threads": 1, "device": "cpu"}  # fmt: skip
    told: list[str] = []
    roster = Roster(tmp_path / "attempt")
    watch = PoolOptions(timeout_s=100.0, probe_s=10.0, stall_s=20.0, backoff_s=0.1)
    pool = Pool("rollout", spawner(engine, options, ENVIRONMENT, lambda _: {}), 1, Sampling(100), watch,
                tell=lambda kind, text: told.append(f"[{kind}] {text}"), stacks=roster.stacks)  # fmt: skip
    hit: list[float] = []

    async def strike() -> None:
        while not pool.roster()["rollout-0"]["calls"]:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        os.kill(pool.roster()["rollout-0"]["pid"], number)
        hit.append(time.monotonic())

    async def test() -> tuple[Loop, Publishing]:
        await pool.start()
        tasks: list[asyncio.Task[None]] = []

        def after(version: int) -> None:
            if version == 2 and not tasks:
                tasks.append(asyncio.create_task(strike()))

        learner = Publishing(FakePolicy(), pool=pool, model=model, publisher=publisher, after=after)
        services = Services(pool, FakeVerify())
        loop = Loop(
            Schedule(steps=STEPS, groups_per_step=GROUPS), GRPO(rollout=Sampled(samples=4)), Numbered(), ByName(),
            services, learner, Checkpoints(Store(tmp_path / "checkpoints")), Evaluator([], Sampling(8)), FakeReport(),
        )  # fmt: skip
        try:
            await loop.run()
        finally:
            pool.close()
            publisher.close()
        return loop, learner

    loop, learner = run(test(), 240)
    report: Any = loop.report
    assert hit, "nobody was struck: the test shows nothing"
    lost = [text for kind, text in report.events if kind == "worker_lost"]
    assert lost, "the loss was not told"
    assert learner.trained == [[GROUPS * s + i for i in range(GROUPS)] for s in range(STEPS)]
    for step, groups, _ in report.rows:
        assert {len(g.samples) for g in groups} == {4}
        assert {s.versions for g in groups for s in g.samples} == {(step - 1, step - 1)}
    assert pool.counts() == {"lost": 1, "preempted": 0, "replaced": 1}
    if number == signal.SIGSTOP:
        assert any("[stalled] rollout-0" in text and "it is killed and replaced" in text for text in told)
        [stack] = (tmp_path / "attempt" / "stacks").iterdir()
        assert "stopped" in stack.read_text()
    else:
        assert re.search("Actor(Died|Unavailable)Error", lost[0])


# --- starts that fail


@pytest.mark.faults("F16", "F5")
@pytest.mark.usefixtures("ray_here")
def test_who_dies_at_every_start_is_taken_out_and_alone_it_ends_the_run() -> None:
    good, bad = toys(), toys(RLKD_FAULT="rollout.start=exit")
    few = PoolOptions(replacements=1, backoff_s=0.01)
    told: list[str] = []

    async def test() -> None:
        pool = Pool("rollout", lambda i: (good, bad)[i](i), 2, Sampling(8), few, tell=lambda _, text: told.append(text))
        await pool.start()
        assert (await pool.generate(np.zeros(3, np.int32)))[0].tokens.shape == (10,)
        assert pool.counts() == {"lost": 2, "preempted": 0, "replaced": 0}
        assert any("rollout-1 was lost 2 times in a row" in text and "1 of 2 go on" in text for text in told)
        pool.close()
        with pytest.raises(NoWorkers, match=r"rollout-0 was lost 2 times in a row.*Actor(Died|Unavailable)Error"):
            await Pool("rollout", bad, 1, Sampling(8), few).start()

    run(test())


# --- a whole run that hangs


@pytest.mark.faults("F20")
def test_a_hung_learner_ends_the_run_with_everybodys_stacks(tmp_path: Path) -> None:
    """The command line, health.on_stall=abort, a stopped learner; and `rlkd why-stuck` while it hangs and after."""
    recipe = {
        "name": "t",
        "model": {"path": str(get("tiny", tmp_path / "tiny"))},
        "data": {"train": {"kind": "arithmetic", "size": 200}},
        "algorithm": {"name": "grpo", "rollout": {"samples": 4}},
        "rewards": {"arithmetic": {}},
        "schedule": {"steps": 1000, "groups_per_step": 4, "stall_s": 12.0},
        "sampler": {"max_tokens": 40, "engine": "hf"},
        "learner": {"max_tokens": 1024},
        "evaluate": {"at_start": False, "at_end": False},
        "checkpoint": {"every": 1},
        "preempt": {"margin_s": 0.0},
        "health": {"on_stall": "abort"},
        "report": {"directory": str(tmp_path / "runs"), "tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_directory = tmp_path / "runs" / "t"
    attempt = run_directory / "attempts" / "0001"
    command = [sys.executable, "-m", "rlkd", "train", "recipe.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        metrics, deadline = run_directory / "metrics.jsonl", time.monotonic() + 200
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        while "learner-0" not in (there := json.loads((attempt / "pids.json").read_text())["actors"]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        pid = there["learner-0"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        told = why_stuck(run_directory)
        assert told["diagnosis"].startswith(f"learner-0 (pid {pid}) is stopped by a signal")
        while "nothing moves any more" not in (run_directory / "events.jsonl").read_text():
            assert time.monotonic() < deadline + 60
            time.sleep(0.2)
        os.kill(pid, signal.SIGCONT)  # or the end would wait, in vain, for it to save and to tidy up
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 6, said[-3000:]
    assert "RLKD-I005" in said, said[-3000:]
    assert "nothing moved any more; awaited: " in said
    names = {path.name.split("-", 1)[1] for path in (attempt / "stacks").iterdir()}
    assert f"learner-0-{pid}.txt" in names
    assert {name.rpartition("-")[0] for name in names} == {"driver", "rollout-0", "reward-0", "learner-0"}
    assert why_stuck(run_directory)["diagnosis"].startswith("the run is over (exit 6)")


# --- nodes that go away


@pytest.fixture
def two_nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without room for anybody, and two nodes with room for one worker each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.cluster
@pytest.mark.faults("F10", "F12", "F13")
def test_a_worker_moves_off_a_node_that_goes_away(two_nodes: tuple[Cluster, list[Any]]) -> None:
    """Told of it: moved, and the call it had ended in peace. Not told (the control, on the other node): WorkerLost."""
    cluster, nodes = two_nodes

    async def test() -> None:
        placement = await reserve([Bundle("rollout-0", {"CPU": 1.0})], 20.0)
        gone: set[str] = set()
        pool = Pool("rollout", toys(6.0, lambda i: placement.options(f"rollout-{i}")), 1, Sampling(8),
                    PoolOptions(backoff_s=0.1), was_draining=gone.__contains__)  # fmt: skip
        await pool.start()
        slot = pool._slots[0]
        assert slot.place is not None
        first = slot.place.node
        running = asyncio.create_task(pool.generate(np.zeros(3, np.int32)))
        await asyncio.sleep(0.5)
        gone.add(first)
        placement.leave(first)
        assert pool.leave(first, 20.0) == 1
        assert len(await running) == 1
        while not pool._slots[0].ready:
            await asyncio.sleep(0.05)
        moved = pool._slots[0].place
        assert moved is not None
        assert moved.node != first
        assert pool.counts() == {"lost": 0, "preempted": 1, "replaced": 1}

        unaware = asyncio.create_task(pool.generate(np.zeros(3, np.int32)))
        await asyncio.sleep(0.5)
        cluster.remove_node(next(n for n in nodes if n.node_id == moved.node), allow_graceful=False)
        with pytest.raises(WorkerLost, match=r"rollout-0\.generate\(prompt 3, samples 1\)"):
            await unaware
        assert pool.counts()["preempted"] == 1  # this one is charged
        assert pool._slots[0].losses.in_a_row == 1
        pool.close()

    run(test())


PATHOLOGICAL = str(Path(__file__).parents[1] / "pathological.py")


@pytest.mark.faults("F6", "F10", "F13")
@pytest.mark.usefixtures("ray_here")
def test_reward_workers_move_too_and_their_losses_there_are_not_charged() -> None:
    rewards = {"Slow": find(f"{PATHOLOGICAL}:Slow")()}
    gone: set[str] = set()
    pool = RewardPool(
        pack(rewards),
        Mix.of(rewards),
        lambda _: "0.5",
        options=WorkerOptions(timeout_s=5.0),
        was_draining=gone.__contains__,
    )
    prompt = Prompt("p", np.array([1, 2], np.int32), "0.5")
    tokens, origin = np.array([1, 2, 3], np.int32), np.array([1, 1, 2], np.uint8)
    sample = Sample(tokens, origin, np.zeros(3, np.float32), (0, 0))

    async def test() -> None:
        await pool.start()
        first = pool.roster()["reward-0"]
        judging = asyncio.create_task(pool(prompt, [sample]))
        while not pool._workers[0]._under_way:
            await asyncio.sleep(0.01)
        assert pool.leave("another", 20.0) == 0
        assert pool.leave(first["node"], 20.0) == 1
        assert [s.reward for s in await judging] == [1.0]  # it ended what it had
        assert pool.counts()["workers_lost"] == 0
        assert [s.reward for s in await pool(prompt, [sample])] == [1.0]
        assert pool.roster()["reward-0"]["pid"] != first["pid"]
        gone.add(first["node"])
        judging = asyncio.create_task(pool(prompt, [sample]))
        for n in range(1, ATTEMPTS + 2):  # more than are forgiven elsewhere
            while not pool._workers[0]._under_way:
                await asyncio.sleep(0.01)
            os.kill(pool.roster()["reward-0"]["pid"], signal.SIGKILL)
            while pool.counts()["workers_lost"] < n:
                await asyncio.sleep(0.01)
        assert [s.reward for s in await judging] == [1.0]
        pool.close()

    run(test())


# --- the object store


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Ray takes the disk for full, so that its object store cannot spill."""
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=80_000_000,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _system_config={"local_fs_capacity_threshold": 0.0001},
    )
    yield
    ray.shutdown()


@pytest.mark.faults("F21")
@pytest.mark.usefixtures("full_disk")
def test_a_full_object_store_is_one_error_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.workers.ask.FULL_WAITS_S", (0.1,))
    spawn = toys()

    async def test() -> None:
        actor = spawn(0)
        await call(actor, "rollout-0.start()", 60.0, "start")
        held = [ray.put(np.zeros(25_000_000, np.uint8)) for _ in range(2)]  # cannot be freed
        with pytest.raises(InfrastructureError) as caught:
            await call(actor, "rollout-0.logp()", 60.0, "logp", [np.zeros(12_000_000, np.int32)])
        del held
        said = str(caught.value)
        assert "RLKD-I615" in said
        assert "rollout-0.logp(): no room for a call of 45.8 MiB: Ray's object store of 7" in said
        assert "GiB free on its disk" in said

    run(test())
