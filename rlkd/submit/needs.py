"""How much room a run needs on a cluster, and what of it is missing where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkd.config.schema import Config
from rlkd.teachers import workers_of
from rlkd.workers.placement import Bundle, bundles

KINDS = ("GPU", "CPU")
CLOSE = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True)
class Node:
    """A node of the cluster. `free` is what nobody uses now; None: Ray does not say."""

    id: str
    address: str
    head: bool
    all: Mapping[str, float]
    free: Mapping[str, float] | None = None
    stable: bool = False  # has the custom resource of nodes that stay
    missing: tuple[str, ...] = ()  # keys of the recipe whose paths are not there
    sees: bool | None = None  # whether the run's folder, as the driver's node has it, is there; None: it did not say
    versions: Mapping[str, str | None] | None = None

    @property
    def name(self) -> str:
        return f"{self.address} (head)" if self.head else self.address

    def room(self, kind: str) -> float:
        return (self.all if self.free is None else self.free).get(kind, 0.0)


def needs(config: Config, gpu: bool, stable: bool = False) -> list[Bundle]:
    """What a run of this recipe asks of the cluster, an entry per actor."""
    sampler, learner = config.sampler, config.learner
    samplers = sampler.workers if sampler.min_workers is None else sampler.min_workers
    return bundles(
        learner.ranks, samplers, sampler.tensor_parallel, config.verifier.workers, workers_of(config), gpu,
        config.ray.share_gpus, stable,
    )  # fmt: skip


def total(wanted: Sequence[Bundle]) -> dict[str, float]:
    return {kind: sum(b.resources.get(kind, 0.0) for b in wanted) for kind in KINDS}


def words(amounts: Mapping[str, float]) -> str:
    """`8 GPU, 12 CPU`; no GPUs are not spoken of."""
    return ", ".join(f"{amounts.get(k, 0.0):g} {k}" for k in KINDS if k == "CPU" or amounts.get(k, 0.0) > 0)


def lacking(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> str | None:
    """What is missing, and what each node has; None if there is room.

    Refuses only what can certainly not be placed now: the sum, or one actor that is too large for every node.
    """
    need = total(wanted)
    short = []
    for kind in KINDS:
        there = sum(node.room(kind) for node in nodes)
        if need[kind] > there + CLOSE:
            short.append(f"{need[kind] - there:g} {kind} more")
    if not short:
        short = list(dict.fromkeys(_place(b, nodes) for b in wanted if not any(_fits(b, n) for n in _for(b, nodes))))
    if not short:
        return None
    return f"needs {words(need)}; missing: {' and '.join(short[:3])}; {has(nodes)}"


def _for(bundle: Bundle, nodes: Sequence[Node]) -> Sequence[Node]:
    """The nodes that may have it: the learner is on those that stay, where there are such."""
    return [n for n in nodes if n.stable] or nodes if bundle.learner else nodes


def _fits(bundle: Bundle, node: Node) -> bool:
    return all(bundle.resources.get(kind, 0.0) <= node.room(kind) + CLOSE for kind in KINDS)


def may_have(node: Node, bundle: Bundle, nodes: Sequence[Node]) -> bool:
    """Whether it would be a place for this actor, if nobody else were there."""
    return node in _for(bundle, nodes) and all(bundle.resources.get(k, 0.0) <= node.all.get(k, 0.0) for k in KINDS)


def _place(bundle: Bundle, nodes: Sequence[Node]) -> str:
    which = "node that stays" if len(_for(bundle, nodes)) < len(nodes) else "node"
    return f"a {which} with {words(bundle.resources)} free, for {bundle.role}"


def has(nodes: Sequence[Node]) -> str:
    """What the nodes have free, one by one."""
    shown = [f"{n.name} {_free(n)}" for n in nodes[:8]]
    more = f", and {len(nodes) - 8} nodes more" if len(nodes) > 8 else ""
    return f"free: {', '.join(shown)}{more}"


def _free(node: Node) -> str:
    parts = [f"{node.room(k):g} of {node.all.get(k, 0.0):g} {k}" for k in KINDS if k == "CPU" or node.all.get(k)]
    return " and ".join(parts)


def node_of(found: Mapping[str, Any]) -> Node:
    """From an answer of probe.py."""
    looked = found["looked"] or {}
    return Node(
        found["id"],
        found["address"],
        bool(found["head"]),
        found["all"],
        found["free"],
        bool(found["stable"]),
        tuple(looked.get("missing", ())),
        looked.get("token"),
        looked.get("versions"),
    )
