"""What Ray says of nodes that are about to be taken away, and what is free on each. The only place that asks Ray's
private state.

Ray's autoscaler, KubeRay, a SIGTERM to `ray start --block` and `ray drain-node` all put a node into this set. Nothing
public tells of it: `ray.nodes()` shows a draining node as any other. A contract test (tests/stack/test_drain.py) holds
these calls against the installed Ray.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2


def draining() -> dict[str, float]:
    """Nodes (hex ids) that are being drained, each with the Unix time in ms when it will be gone; 0: not known."""
    found: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: float(deadline_ms) for node, deadline_ms in found.items()}


def free() -> dict[str, dict[str, float]]:
    """What every living node has left, by its id. It may be a moment old."""
    found: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    return {node: dict(resources) for node, resources in found.items()}


def own_node() -> str:
    """The node of the calling process."""
    return str(ray.get_runtime_context().get_node_id())


def nodes_of(actors: Iterable[Any]) -> frozenset[str]:
    """The nodes where these actors (their handles) are, without those that ended or have no node yet. Others of the
    same class may be in the job: all trials of a sweep are in one."""
    own = {actor._actor_id.hex() for actor in actors}
    rows = ray._private.state.actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id())) if own else {}
    return frozenset(
        row["Address"]["NodeID"]
        for name, row in rows.items()
        if name in own and row["State"] != "DEAD" and row["Address"]["NodeID"]
    )


def drain(node: str, seconds: float, reason: str = "rlkd chaos") -> None:
    """Give a node notice as a cloud does. RuntimeError if Ray does not take it. For tests and `rlkd chaos`."""
    client = ray._raylet.GcsClient(  # type: ignore[attr-defined]
        address=ray.get_runtime_context().gcs_address
    )
    deadline_ms = int((time.time() + seconds) * 1000)
    why = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    accepted, message = client.drain_node(node, why, reason, deadline_ms)
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {node}: {message}")
