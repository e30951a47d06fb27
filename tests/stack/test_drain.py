"""The contract with Ray's private state: what rlkd/workers/drain.py asks, on a real cluster of two nodes."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from rlkd.config.schema import PreemptConfig
from rlkd.core.stop import Stop
from rlkd.preempt import Watcher, watching
from rlkd.workers import drain

pytestmark = [pytest.mark.stack, pytest.mark.cluster]


class LearnerRank:
    """An actor called as the learner's are."""

    def ready(self) -> bool:
        return True


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, str, Any]]:
    """The head's id, that of a worker node with an actor on it, and the actor."""
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        worker = cluster.add_node(**small, resources={"spot": 1})
        cluster.wait_for_nodes()
        actor: Any = ray.remote(LearnerRank).options(resources={"spot": 0.5}).remote()
        assert ray.get(actor.ready.remote(), timeout=60)
        yield drain.own_node(), worker.node_id, actor
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.faults("F10", "F11", "F13")
def test_a_drained_node_is_seen_and_remembered(nodes: tuple[str, str, Any]) -> None:
    head, worker, actor = nodes
    assert drain.draining() == {}
    assert drain.nodes_of([actor]) == {worker}
    assert drain.nodes_of([]) == frozenset()
    other: Any = ray.remote(LearnerRank).options(num_cpus=0, resources={"node:__internal_head__": 0.01}).remote()
    assert ray.get(other.ready.remote(), timeout=60)
    assert drain.nodes_of([actor]) == {worker}  # another run's learner, in the same job
    assert drain.nodes_of([actor, other]) == {worker, head}
    stop, told, left = Stop(), [], []
    watcher = Watcher(
        PreemptConfig(poll_s=0.2), stop, drain.draining, lambda *what: told.append(what), lambda: {head}, left.append
    )

    async def main() -> None:
        async with watching(watcher):
            await asyncio.to_thread(drain.drain, worker, 40.0)
            end = time.monotonic() + 30
            while not left:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)

    asyncio.run(main())
    ((node, seconds),) = left[0].items()
    assert node == worker
    assert seconds is not None
    assert 5 < seconds <= 40  # Ray's own clock and ours are the same here
    assert watcher.was_draining(worker)
    assert not stop.is_set()

    learners = Watcher(PreemptConfig(), stop, drain.draining, lambda *what: told.append(what))
    learners.look(drain.draining(), drain.nodes_of([actor]))  # the same node: a learner's rank is on it
    assert stop.request is not None
    assert stop.request.kind == "drain"
    assert stop.left_s() is not None
