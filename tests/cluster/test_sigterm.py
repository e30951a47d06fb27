"""SIGTERM to a node, as Kubernetes ends a pod and `ray stop` a node: nobody asked Ray to drain it before."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from rlkd.config.schema import PreemptConfig
from rlkd.core.errors import WorkerLost
from rlkd.core.ports import Sampling
from rlkd.core.stop import Stop
from rlkd.preempt import Watcher, watching
from rlkd.workers import drain
from rlkd.workers.placement import NODE
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.rollout import spawner
from tests.cluster.help import ROOT, STORE, nodes
from tests.cluster.ray_head import BIN, end
from tests.pool_fakes import PROMPT

pytestmark = [pytest.mark.stack, pytest.mark.cluster, pytest.mark.timeout(200)]
GRACE_S = 5  # that Ray lets a node's work go on after SIGTERM (30 if not told)


@contextmanager
def pod(address: str) -> Iterator[tuple[str, int]]:
    """A node as a pod has it, `ray start --block`: its id, and the process that gets the SIGTERM."""
    command = [str(BIN / "ray"), "start", f"--address={address}", "--block", "--num-cpus=1", "--disable-usage-stats",
               f"--object-store-memory={STORE}"]  # fmt: skip
    own = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(GRACE_S), "PYTHONPATH": str(ROOT)}
    before, null = living(), subprocess.DEVNULL
    process = subprocess.Popen(command, env={**os.environ, **own}, stdout=null, stderr=null)
    try:
        until = time.monotonic() + 90
        while not (new := living() - before):
            assert process.poll() is None, "the node ended"
            assert time.monotonic() < until, "the node did not join"
            time.sleep(0.1)
        yield new.pop(), process.pid
    finally:
        end(process.pid)
        process.wait(30)


def living() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.faults("F13")
def test_who_is_lost_with_a_node_that_got_sigterm_is_charged_to_nobody() -> None:
    """`ray start` drains its node: the watcher sees that, and workers move. A raylet just goes; Ray tells why."""
    told: list[str] = []

    def tell(kind: str, text: str) -> None:
        told.append(f"{kind}: {text}")

    async def test(there: list[str], terminate: Callable[[], None]) -> None:
        first = dict(enumerate(there))  # their replacements go where they can
        actor: Any = lambda i: {"label_selector": {NODE: first.pop(i)}} if i in first else {}  # noqa: E731
        spawn = spawner("tests.toy_engine:Toy", {"seconds": 1000.0}, {}, actor)
        options = PoolOptions(timeout_s=120.0, start_s=120.0)
        watcher = Watcher(PreemptConfig(poll_s=0.2), Stop(), drain.draining, tell)
        pool = Pool("rollout", spawn, 2, Sampling(4), options, tell=tell, was_draining=watcher.was_draining)
        watcher.on_nodes = lambda left: [pool.leave(name, seconds) for name, seconds in left.items()] and None
        try:
            async with watching(watcher):
                await pool.start()
                calls = [asyncio.create_task(pool.generate(PROMPT)) for _ in there]
                while not all(slot.calls for slot in pool._slots):
                    await asyncio.sleep(0.01)
                terminate()
                ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
                assert [type(end) for end in ends] == [WorkerLost] * 2, ends
                assert [watcher.was_draining(node) for node in there] == [True, False], told
                late = int("ActorUnavailableError" in str(ends[1]))  # a busy Ray does not know yet why it died
                assert pool.counts()["preempted"] == 2 - late, told
                assert [slot.losses.in_a_row for slot in pool._slots] == [0, late], told
        finally:
            pool.close()

    with nodes() as cluster, pod(cluster.address) as (drained, process):
        other = cluster.add()

        def terminate() -> None:
            os.kill(process, signal.SIGTERM)
            cluster.kill(other, signal.SIGTERM)

        asyncio.run(test([drained, other], terminate))
