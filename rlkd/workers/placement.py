"""Which resources a run asks of the Ray cluster, and where its actors go.

    learner ranks                 one placement group, packed; on nodes that stay, where the cluster has such (nodes.py)
    everybody who can be replaced a group each, away from the nodes that stay; Ray takes the emptiest node
    with ray.share_gpus           one group: a bundle is a whole GPU, with a rank and all others of its number

A group of one's own is a seat that may be waited for and left: a worker moves when its node goes away, and more come
when a node joins.
"""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlkd.core.errors import PreflightError
from rlkd.workers import drain
from rlkd.workers.aside import aside
from rlkd.workers.demand import A_LITTLE, CPU_SHARE, Bundle, as_one, bundles, side_by_side
from rlkd.workers.nodes import STABLE, Node, alive

log = logging.getLogger("rlkd.workers")
NODE = "ray.io/node-id"  # Ray labels every node with it
LOOK_S, SOON_S = 2.0, 0.1  # between two looks for a place; while the run starts
__all__ = ["A_LITTLE", "CPU_SHARE", "Bundle", "Placement", "bundles", "has_room", "reserve"]


@dataclass(frozen=True)
class Seat:
    """Room for one actor: a bundle of a placement group."""

    bundle: Bundle
    group: PlacementGroup
    index: int = 0
    alone: bool = False  # in a group of its own: it may be given up for another one
    labels: Mapping[str, str] = field(default_factory=dict)  # which nodes may have it

    @classmethod
    def alone_for(cls, bundle: Bundle, labels: Mapping[str, str]) -> "Seat":
        """Asks Ray for it; it is there later, or never."""
        return cls(bundle, _group([bundle], "PACK", labels), alone=True, labels=labels)

    @property
    def table(self) -> dict[str, Any]:
        return placement_group_table(self.group)

    @property
    def placed(self) -> bool:
        return bool(self.table.get("state") == "CREATED")

    @property
    def node(self) -> str | None:
        """Where it is; None while it is nowhere."""
        found: str | None = self.table.get("bundles_to_node_id", {}).get(self.index)
        return found or None


@dataclass
class Placement:
    """A seat for each role."""

    seats: dict[str, Seat]
    given: bool = False  # by who started this process (Ray Tune: a trial's own group), and not to be released here
    leaving: set[str] = field(default_factory=set, init=False)  # nodes that go away
    _left: list[tuple[Seat, str]] = field(default_factory=list, init=False)  # given up, where actors may still end

    @property
    def cores(self) -> int | None:
        """Cores that this run may use on all its nodes together; None: whatever the nodes have."""
        if not self.given:
            return None
        return max(1, math.floor(sum(s.bundle.resources.get("CPU", 0.0) for s in self.seats.values()) + 1e-6))

    def options(self, role: str) -> dict[str, Any]:
        """Ray actor options that put `role` into its seat. One on a node that goes away is given up for another; if it
        is not alone in its group: anywhere, which is where Ray finds room (never on a node that drains)."""
        seat = self._current(role)
        bundle = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.index)
        return {
            "num_cpus": seat.bundle.resources["CPU"],
            "num_gpus": seat.bundle.resources.get("GPU", 0),
            "max_restarts": 0,  # Ray would restart an actor with its first weights; supervision is ours
            "scheduling_strategy": "DEFAULT" if self._leaves(seat) else bundle,
        }

    async def seated(self, role: str) -> None:
        """Returns when Ray has found room for `role`, however long that takes."""
        while not await self._is_seated(role):
            await asyncio.sleep(LOOK_S)

    async def _is_seated(self, role: str) -> bool:
        try:
            seat = self._current(role)
            return await aside(lambda: seat.placed)
        except Exception as error:  # Ray's head restarts, the network is gone: the place may still come
            log.warning("Ray does not say where %s is: %s: %s", role, type(error).__name__, error)
            return False

    def _current(self, role: str) -> Seat:
        seat = self.seats[role]
        if seat.alone and self._leaves(seat):
            self._left.append((seat, str(seat.node)))
            seat = self.seats[role] = Seat.alone_for(seat.bundle, seat.labels)
        return seat

    def _leaves(self, seat: Seat) -> bool:
        return bool(self.leaving) and seat.node in self.leaving

    def leave(self, node: str) -> None:
        """From now on put nobody on this node."""
        self.leaving.add(node)

    def tidy(self, nodes: Collection[str]) -> None:
        """Give back the seats that were given up and whose node is no longer among `nodes`: Ray would look for another
        place for them."""
        gone = [one for one in self._left if one[1] not in nodes]
        self._left = [one for one in self._left if one[1] in nodes]
        for seat, _ in gone:
            remove_placement_group(seat.group)

    def where(self, roles: Collection[str] | None = None) -> dict[str, str]:
        """The node of each of these roles (None: of all) that has a place."""
        found = ((role, self.seats[role].node) for role in (self.seats if roles is None else roles))
        return {role: node for role, node in found if node is not None}

    def release(self) -> None:
        """Give back everything, except a group that is somebody else's."""
        if not self.given:
            for seat in {s.group.id: s for s in (*self.seats.values(), *(s for s, _ in self._left))}.values():
                remove_placement_group(seat.group)


async def reserve(
    wanted: Sequence[Bundle], wait_s: float, more: Sequence[Bundle] = (), together: bool = False, shared: bool = False
) -> Placement:
    """Room for all of `wanted`, or PreflightError that says what is missing after at most `wait_s` seconds; and seats
    for `more`, which may come later or never. `together`: on one node, for shared memory. `shared`: those of the same
    number share a GPU (`side_by_side`).

    A process that was itself put into a placement group (a trial of a sweep) has its room there already.
    """
    if (own := get_current_placement_group()) is not None:
        _refuse_to_share(wanted, shared)
        roles = enumerate(seated(wanted, own.bundle_specs))
        return Placement({b.role or f"free-{index}": Seat(b, own, index) for index, b in roles}, given=True)
    until, placement = time.monotonic() + wait_s, Placement({})
    first = side_by_side([*wanted, *more]) if shared else [[b] for b in wanted if b.learner]
    apart = {b.role for some in first for b in some}
    need = [*(as_one(some) if shared else some[0] for some in first), *(b for b in wanted if b.role not in apart)]
    try:
        if first:
            group = _group(need[: len(first)], "STRICT_PACK" if together else "PACK")
            placement.seats |= {b.role: Seat(b, group, i) for i, some in enumerate(first) for b in some}
            if together or any(node.stable for node in await aside(alive)):
                # who is to keep off its nodes asks later: nodes that an autoscaler adds are not known before
                await _placed(placement, need, until, wait_s)
        place = {NODE: str(placement.seats[first[0][0].role].node)} if together and first else None
        nodes = await aside(alive)
        others = {b.role: (b, _elsewhere(b, nodes) if place is None else place) for b in (*wanted, *more)
                  if b.role not in apart}  # fmt: skip
        placement.seats |= {b.role: Seat.alone_for(*others[b.role]) for b in wanted if b.role in others}
        await _placed(placement, need, until, wait_s)
        placement.seats |= {b.role: Seat.alone_for(*others[b.role]) for b in more if b.role in others}
    except BaseException:
        placement.release()
        raise
    return placement


def _refuse_to_share(wanted: Sequence[Bundle], shared: bool) -> None:
    """PreflightError if ranks share GPUs in a group that somebody else made: it has a bundle for each actor, and which
    of them are of one GPU is for Ray to say."""
    ranks = sum(b.learner for b in wanted)
    if shared and ranks > 1:
        what = f"a trial's placement group cannot have {ranks} GPUs that are shared by learner and samplers"
        fix = "in a sweep ray.share_gpus=false, or learner.ranks=1"
        raise PreflightError("RLKD-E023", what, where="ray.share_gpus", fix=fix)


async def has_room(wanted: Sequence[Bundle], strategy: str, wait_s: float) -> None:
    """PreflightError as from `reserve` if the cluster has no room for all of `wanted` in one group."""
    group = _group(wanted, strategy)
    tried = Placement({b.role: Seat(b, group, i) for i, b in enumerate(wanted)})
    try:
        await _placed(tried, wanted, time.monotonic() + wait_s, wait_s)
    finally:
        tried.release()


def _group(wanted: Sequence[Bundle], strategy: str, labels: Mapping[str, str] | None = None) -> PlacementGroup:
    selectors = [dict(labels)] * len(wanted) if labels else None
    return placement_group([dict(b.resources) for b in wanted], strategy=strategy, bundle_label_selector=selectors)


def _elsewhere(bundle: Bundle, nodes: Sequence[Node]) -> dict[str, str]:
    """Labels that keep it off the nodes that stay, if another node is large enough for it."""
    stay = [n.id for n in nodes if n.stable]
    if not stay or not any(_fits(bundle.resources, n.total) for n in nodes if not n.stable):
        return {}
    return {NODE: f"!in({','.join(stay)})"}  # no spaces: Ray takes them for a part of the value


async def _placed(placement: Placement, wanted: Sequence[Bundle], until: float, wait_s: float) -> None:
    """Wait for all seats that were asked for; PreflightError when the time is up."""
    while missing := await aside(lambda: [s.bundle for s in placement.seats.values() if not s.placed]):
        if time.monotonic() > until:
            raise PreflightError(
                "RLKD-E020",
                f"the cluster cannot place this run within {wait_s:g} s: {_missing(missing, wanted)}",
                where="ray",
                fix="ask for fewer workers or ranks (sampler.min_workers: begin with fewer), or add nodes; "
                "`ray status` shows what is in use",
            )
        await asyncio.sleep(SOON_S)


def seated(wanted: Sequence[Bundle], specs: Sequence[Mapping[str, float]]) -> tuple[Bundle, ...]:
    """The roles in the bundles of a group that somebody else made, which may hold more; the first, in which this
    process is, stays its own. PreflightError if one has no room."""
    seats = [Bundle("", spec) for spec in specs]
    for bundle in wanted:
        free = [i for i, seat in enumerate(seats) if i and not seat.role and _fits(bundle.resources, seat.resources)]
        if not free:
            raise PreflightError(
                "RLKD-E023",
                f"{bundle.role} needs {_in_words(bundle.resources)}, and this trial's placement group has no such place"
                f" left: {'; '.join(_in_words(spec) for spec in specs)}",
                where="ray",
                fix="let rlkd.tune.trainable say the resources: no tune.with_resources around it",
            )
        index = min(free, key=lambda i: [seats[i].resources.get(kind, 0.0) for kind in (STABLE, "GPU", "CPU")])
        seats[index] = Bundle(bundle.role, bundle.resources)
    return tuple(seats)


def _fits(wanted: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(room.get(kind, 0.0) >= amount - 1e-6 for kind, amount in wanted.items())


def _in_words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if kind != STABLE)


def _missing(missing: Sequence[Bundle], wanted: Sequence[Bundle]) -> str:
    """Who has no place, what the run needs, and what each node has left."""
    nodes, free = alive(), drain.free()
    kinds = [kind for kind in ("CPU", "GPU") if any(kind in b.resources for b in wanted)]
    need = "; ".join(f"{sum(b.resources.get(k, 0.0) for b in wanted):g} {k} needed" for k in kinds)
    rows = [
        f"{node.name} has "
        + ", ".join(f"{free.get(node.id, {}).get(k, 0.0):g} of {node.total.get(k, 0.0):g} {k}" for k in kinds)
        for node in sorted(nodes, key=lambda n: n.id)[:8]
    ]
    more = f", and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
    who = [
        f"{b.role} ({_in_words(b.resources)}{', on a stable node' if STABLE in b.resources else ''})"
        for b in missing[:3]
    ]
    rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{need}; no room for {', '.join(who)}{rest}; free now: {'; '.join(rows)}{more}"
