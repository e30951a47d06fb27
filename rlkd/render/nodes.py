"""Which nodes a run's actors need: how many, how large, on which the run depends.

    head      the driver, and the learner if one node holds all of it      stable
    learner   else whole nodes of learner ranks                            stable
    rollout, scorer, reward   what the run can lose and start elsewhere    preemptible

Stable nodes carry the custom resource `stable`: by it rlkd finds them (workers/placement.py).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlkd.core.errors import ConfigError

ROLES = ("learner", "rollout", "reward")  # every other role is a scorer's or a writer's


@dataclass(frozen=True)
class Machine:
    """One node of the platform. `gpus=0`: there are none, and the run uses none."""

    gpus: int
    cpus: int
    memory_gib: int


@dataclass(frozen=True)
class Needs:
    """A recipe's actors: for each, how many GPUs it takes (0.0 on CPU)."""

    learner: tuple[float, ...]
    rollout: tuple[float, ...]
    scorer: tuple[float, ...]
    reward: int
    least_rollout: int  # the run goes on with so many rollout workers
    shared: bool = False  # all on the same GPUs: ray.share_gpus
    rank_gib: float = 0.0  # of a node's own memory, for each learner rank on it,
    node_gib: float = 0.0  # and for all of them together (plan/memory.py)

    def ranks_on(self, node: Machine) -> int:
        """Learner ranks that a node has at most; without GPUs one has them all."""
        return min(len(self.learner), node.gpus) if node.gpus else len(self.learner)

    def memory_gib(self, ranks: int) -> int:
        """What a node with so many learner ranks must have at least."""
        return math.ceil(ranks * self.rank_gib + self.node_gib) if ranks else 0

    @classmethod
    def of(cls, bundles: Iterable[tuple[str, Mapping[str, float]]], least_rollout: int, shared: bool) -> "Needs":
        """From the roles and resources of a run's bundles (workers/placement.py)."""
        gpus: dict[str, list[float]] = {"learner": [], "rollout": [], "reward": [], "scorer": []}
        for role, resources in bundles:
            kind = role.rpartition("-")[0]
            gpus[kind if kind in ROLES else "scorer"].append(float(resources.get("GPU", 0.0)))
        learner, rollout, scorer = (tuple(gpus[kind]) for kind in ("learner", "rollout", "scorer"))
        return cls(learner, rollout, scorer, len(gpus["reward"]), min(least_rollout, len(rollout)), shared)

    @classmethod
    def most(cls, several: Sequence["Needs"]) -> "Needs":
        """What is enough for each of several stages."""

        def longest(name: str) -> tuple[float, ...]:
            return max((getattr(n, name) for n in several), key=lambda gpus: (sum(gpus), len(gpus)))

        least = min(n.least_rollout for n in several)
        reward, shared = max(n.reward for n in several), any(n.shared for n in several)
        memory = max(n.rank_gib for n in several), max(n.node_gib for n in several)
        return cls(longest("learner"), longest("rollout"), longest("scorer"), reward, least, shared, *memory)


@dataclass(frozen=True)
class Kind:
    """Nodes that are the same. `stable`: the run cannot do without one; else they may be taken away."""

    name: str
    carries: str  # in words
    count: int
    least: int  # with so many the run goes on
    machine: Machine
    stable: bool = False


@dataclass(frozen=True)
class Layout:
    """All nodes of a run, the head first."""

    kinds: tuple[Kind, ...]
    notes: tuple[str, ...] = ()  # what is wasted

    @property
    def head(self) -> Kind:
        return self.kinds[0]

    @property
    def workers(self) -> tuple[Kind, ...]:
        return self.kinds[1:]

    @property
    def nodes(self) -> int:
        return sum(kind.count for kind in self.kinds)


@dataclass(frozen=True)
class Packed:
    """Equal nodes that hold everybody, the learner's first."""

    nodes: int
    with_learner: int
    apart: bool = True  # nobody else needs room on the learner's
    idle: int = 0  # GPUs that nobody uses

    @property
    def stable(self) -> int:
        """How many, from the first, may carry the resource `stable`: a run puts nobody but the learner there while it
        has other nodes, so that none may where the others need their room."""
        return self.with_learner if self.apart or self.nodes == self.with_learner else 0


def by_kind(needs: Needs, node: Machine, small: Machine) -> Layout:
    """Nodes of their own for every role, so that each may be stable or preemptible.

    `node` has the GPUs, `small` carries what needs none. ConfigError RLKD-C442 if the actors do not fit the nodes.
    """
    if node.gpus == 0:
        return _without_gpus(needs, node)
    if needs.shared:
        return _on_the_same(needs, node)
    kinds, notes = list(_learners(needs, node, small)), []
    for name, key, carried in (("rollout", "sampler", needs.rollout), ("scorer", "teachers", needs.scorer)):
        if not carried:
            continue
        each = _gpus_of_one(key, carried, node)
        on_a_node = node.gpus // each
        count = math.ceil(len(carried) / on_a_node)
        least = math.ceil(needs.least_rollout / on_a_node) if name == "rollout" else count
        gpus = min(node.gpus, each * len(carried))
        if idle := count * gpus - each * len(carried):
            notes.append(f"{idle} of the {count * gpus} GPUs of the {name} nodes stay idle")
        kinds.append(Kind(name, _words(needs, name), count, least, _part(node, gpus)))
    if needs.reward:
        count = math.ceil(needs.reward / small.cpus)
        kinds.append(Kind("reward", _words(needs, "reward"), count, count, small))
    return Layout(tuple(kinds), tuple(notes))


def packed(needs: Needs, node: Machine) -> Packed:
    """As few equal nodes as hold everybody.

    For platforms that give and take all nodes at once. ConfigError RLKD-C442 if the actors do not fit the nodes.
    """
    if node.gpus == 0:
        return Packed(1, 1)
    if needs.shared:
        nodes = _on_the_same(needs, node).nodes
        return Packed(nodes, nodes, idle=nodes * node.gpus - len(needs.learner))
    with_learner = 1
    if len(needs.learner) > node.gpus:
        with_learner = _whole(needs, node) // node.gpus
    free = [node.gpus] * with_learner
    _fill(free, needs.learner, node)
    first = with_learner
    for key, carried in (("sampler", needs.rollout), ("teachers", needs.scorer)):
        if carried:
            _gpus_of_one(key, carried, node)
            first = min(first, _fill(free, carried, node))
    others = len(needs.rollout) + len(needs.scorer) + needs.reward
    actors = len(needs.learner) + others
    if actors > len(free) * node.cpus:
        what = (
            f"{actors} actors take a CPU each, and {len(free)} nodes of {node.cpus} CPUs have {len(free) * node.cpus}"
        )
        raise ConfigError("RLKD-C442", what, where="--cpus-per-node", fix=f"at least {math.ceil(actors / len(free))}")
    apart = first >= with_learner and others <= (len(free) - with_learner) * node.cpus
    return Packed(len(free), with_learner, apart, sum(free))


def _whole(needs: Needs, node: Machine) -> int:
    """GPUs of the learner. ConfigError RLKD-C442 unless they are part of one node, or nodes as a whole."""
    key, gpus = "learner.ranks", len(needs.learner)
    if gpus > node.gpus and gpus % node.gpus:
        fits = ", ".join(str(n) for n in range(1, min(gpus, 16) + 1) if gpus % n == 0)
        raise ConfigError(
            "RLKD-C442",
            f"{key}={gpus} are not whole nodes of {node.gpus} GPUs: {gpus % node.gpus} GPUs would be left over",
            where="--gpus-per-node",
            fix=f"{key}={node.gpus * max(1, gpus // node.gpus)}, or nodes of so many GPUs: {fits}",
        )
    return gpus


def _on_the_same(needs: Needs, node: Machine) -> Layout:
    """ray.share_gpus: everybody on the GPUs of the learner's ranks."""
    gpus = _whole(needs, node)
    words = f"{_words(needs, 'learner', 'rollout', 'scorer', 'reward')}, on the same GPUs"
    head = Kind("head", f"the driver, {words}", 1, 1, _of_ranks(needs, node, gpus), True)
    more = math.ceil(gpus / node.gpus) - 1
    others = Kind("learner", "its other GPUs", more, more, _of_ranks(needs, node, gpus), True)
    return Layout((head, others) if more > 0 else (head,))


def _learners(needs: Needs, node: Machine, small: Machine) -> Iterable[Kind]:
    """The head, with all of the learner if one node holds it; else the head and whole nodes of ranks."""
    gpus = _whole(needs, node)
    if gpus <= node.gpus:
        yield Kind("head", f"the driver, {_words(needs, 'learner')}", 1, 1, _of_ranks(needs, node, gpus), True)
        return
    yield Kind("head", "the driver", 1, 1, Machine(0, small.cpus, small.memory_gib), True)
    count = gpus // node.gpus
    yield Kind("learner", _words(needs, "learner"), count, count, _of_ranks(needs, node, gpus), True)


def _without_gpus(needs: Needs, node: Machine) -> Layout:
    """A worker uses all cores of its node, so each rollout worker and scorer gets one."""
    rollout, scorer = len(needs.rollout), len(needs.scorer)
    kinds = [Kind("head", f"the driver, {_words(needs, 'learner')}", 1, 1, equal_node(needs, node), True)]
    if rollout:
        kinds.append(Kind("rollout", _words(needs, "rollout"), rollout, needs.least_rollout, node))
    if scorer:
        kinds.append(Kind("scorer", _words(needs, "scorer"), scorer, scorer, node))
    if needs.reward:
        count = math.ceil(needs.reward / node.cpus)
        kinds.append(Kind("reward", _words(needs, "reward"), count, count, node))
    return Layout(tuple(kinds))


def _gpus_of_one(key: str, carried: Sequence[float], node: Machine) -> int:
    each = max(1, math.ceil(max(carried)))
    if node.gpus % each:
        fits = [n for n in range(1, node.gpus + 1) if node.gpus % n == 0]
        name = "sampler.tensor_parallel" if key == "sampler" else key
        more = f"nodes of {each} GPUs or a multiple" if each > node.gpus else f"one of {', '.join(map(str, fits))}"
        raise ConfigError(
            "RLKD-C442",
            f"{name}={each} does not divide the {node.gpus} GPUs of a node",
            where="--gpus-per-node",
            fix=f"{more}; a worker's GPUs must be on one node",
        )
    return each


def _fill(free: list[int], carried: Sequence[float], node: Machine) -> int:
    """Take GPUs of the first node that has enough, of a new one where none has. The first node that was used."""
    first = len(free)
    for gpus in carried:
        each = max(1, math.ceil(gpus))
        at = next((i for i, left in enumerate(free) if left >= each), None)
        if at is None:
            free.append(node.gpus)
            at = len(free) - 1
        free[at] -= each
        first = min(first, at)
    return first


def equal_node(needs: Needs, node: Machine) -> Machine:
    """The node of which `packed` takes some, with memory for as many learner ranks as one may have."""
    return replace(node, memory_gib=max(node.memory_gib, needs.memory_gib(needs.ranks_on(node))))


def _of_ranks(needs: Needs, node: Machine, gpus: int) -> Machine:
    """As much of a node as so many ranks take, a GPU each; a whole one where it has fewer."""
    part = _part(node, gpus)
    return replace(part, memory_gib=max(part.memory_gib, needs.memory_gib(min(gpus, node.gpus))))


def _part(node: Machine, gpus: int) -> Machine:
    """The share of a node that has so many of its GPUs."""
    if gpus >= node.gpus:
        return node
    share = gpus / node.gpus
    return Machine(gpus, max(1, int(node.cpus * share)), max(1, int(node.memory_gib * share)))


def _words(needs: Needs, *kinds: str) -> str:
    named = {
        "learner": "learner rank",
        "rollout": "rollout worker",
        "scorer": "frozen model",
        "reward": "reward worker",
    }
    counts = {k: needs.reward if k == "reward" else len(getattr(needs, k)) for k in kinds}
    return ", ".join(f"{n} {named[k]}{'s' if n != 1 else ''}" for k, n in counts.items() if n)
