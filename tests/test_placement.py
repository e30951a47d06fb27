"""Where Ray puts what a run asks for: a simulation of its rules. GPUs are given by best fit, as Ray does."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.util.placement_group import PlacementGroup

from rlkd import site
from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.core.errors import ConfigError, PreflightError
from rlkd.workers import placement
from rlkd.workers.demand import Bundle, bundles, shares, side_by_side
from rlkd.workers.nodes import STABLE, Node
from rlkd.workers.placement import NODE, Placement, reserve

RECIPE = Path(__file__).parents[1] / "configs" / "grpo-tiny.yaml"
CLOSE = 1e-6


class Group(PlacementGroup):  # type: ignore[misc]  # Ray's have no types
    def __init__(self, number: int, specs: list[dict[str, float]], labels: Mapping[str, str]) -> None:
        self.id, self.specs, self.labels = number, specs, labels
        self.places: list[tuple[str, int | None]] = []  # node, GPU; empty: not placed

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        return self.specs


class Simulated:
    """Nodes that come one by one, a node at every look; groups are placed whole, whichever fits."""

    def __init__(self, *nodes: Node, there: int = 1) -> None:
        self.nodes, self.there = nodes, there
        self.gpus = {n.id: [1.0] * int(n.total.get("GPU", 0)) for n in nodes}
        self.groups: list[Group] = []

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(placement, "alive", lambda: list(self.nodes[: self.there]))
        patch.setattr(placement, "placement_group", self.group)
        patch.setattr(placement, "placement_group_table", self.table)
        patch.setattr(placement, "remove_placement_group", self.groups.remove)
        patch.setattr(placement, "get_current_placement_group", lambda: None)
        patch.setattr(placement, "SOON_S", 0.001)
        patch.setattr(placement.drain, "free", dict)

    def group(
        self, specs: list[dict[str, float]], strategy: str, bundle_label_selector: list[dict[str, str]] | None
    ) -> Group:
        assert strategy in ("PACK", "STRICT_PACK")
        self.groups.append(Group(len(self.groups), specs, (bundle_label_selector or [{}])[0]))
        self.place()
        return self.groups[-1]

    def table(self, group: Group) -> dict[str, Any]:
        nodes = {i: node for i, (node, _) in enumerate(group.places)}
        found = {"state": "CREATED" if group.places else "PENDING", "bundles_to_node_id": nodes}
        if group is self.groups[-1]:  # one round of looks is over
            self.there = min(self.there + 1, len(self.nodes))
            self.place()
        return found

    def place(self) -> None:
        for group in self.groups:
            if not group.places:
                before = {node: list(free) for node, free in self.gpus.items()}
                places = [self.one(spec, group.labels) for spec in group.bundle_specs]
                if all(p is not None for p in places):
                    group.places = [p for p in places if p is not None]
                else:
                    self.gpus = before

    def one(self, spec: Mapping[str, float], labels: Mapping[str, str]) -> tuple[str, int | None] | None:
        amount = spec.get("GPU", 0.0)
        for node in self.nodes[: self.there]:
            if node.id in labels.get(NODE, "") or spec.get(STABLE, 0.0) > node.total.get(STABLE, 0.0):
                continue
            free = self.gpus[node.id]
            if not amount:
                return node.id, None
            enough = [gpu for gpu, left in enumerate(free) if left >= amount - CLOSE]
            if enough:
                gpu = min(enough, key=lambda g: free[g])
                free[gpu] -= amount
                return node.id, gpu
        return None


def gpus_of(found: Placement) -> dict[tuple[str, int | None], list[str]]:
    """Who is on which GPU."""
    on: dict[tuple[str, int | None], list[str]] = {}
    for role, seat in found.seats.items():
        group: Any = seat.group
        if (where := group.places[seat.index])[1] is not None:
            on.setdefault(where, []).append(role)
    return on


def kinds(roles: Sequence[str]) -> list[str]:
    return sorted(role.rpartition("-")[0] for role in roles)


def test_by_best_fit_halves_end_on_one_gpu() -> None:
    """The control: what Ray makes of two ranks and two samplers that each ask for a part."""
    simulated = Simulated(Node("a", "", {"GPU": 2.0}))
    assert [simulated.one({"GPU": part}, {}) for part in (0.5, 0.5, 0.4, 0.4)] == [("a", g) for g in (0, 0, 1, 1)]


@given(
    ranks=st.integers(1, 8), workers=st.integers(1, 8), rewards=st.integers(0, 2), gpus=st.integers(1, 8),
    scorers=st.lists(st.integers(1, 8), max_size=3),
)  # fmt: skip
def test_who_shares_gpus_is_alone_of_its_role_on_each(
    ranks: int, workers: int, rewards: int, gpus: int, scorers: list[int]
) -> None:
    counts = {f"teacher:{i}": min(n, ranks) for i, n in enumerate(scorers)}
    wanted = bundles(ranks, min(workers, ranks), 1, rewards, counts, gpu=True, share_gpus=True, stable=True)
    nodes = [Node(f"n{i}", "", {"GPU": float(gpus), "CPU": 64.0, STABLE: 1.0}) for i in range(-(-ranks // gpus))]
    nodes.append(Node("spot", "", {"GPU": 8.0, "CPU": 64.0}))
    with pytest.MonkeyPatch.context() as patch:
        Simulated(*nodes, there=len(nodes)).patch(patch)
        found = asyncio.run(reserve(wanted, 5.0, shared=True))
        assert {s.node for role, s in found.seats.items() if role.startswith("reward")} <= {"spot"}
    on = gpus_of(found)
    assert sum(len(roles) for roles in on.values()) == len(wanted) - rewards
    assert len(on) == ranks
    for where, roles in on.items():
        assert where[0] != "spot"
        assert "learner" in kinds(roles)
        assert len(set(kinds(roles))) == len(roles)
        assert sum(found.seats[role].bundle.resources["GPU"] for role in roles) <= 1 + CLOSE


def test_workers_that_come_later_have_their_place_beside_a_rank_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(Node("a", "", {"GPU": 2.0, "CPU": 8.0})).patch(monkeypatch)
    every = bundles(2, 2, 1, 1, {"reference": 1}, gpu=True, share_gpus=True)
    later = [b for b in every if b.role == "rollout-1"]
    found = asyncio.run(reserve([b for b in every if b not in later], 5.0, later, shared=True))
    assert sorted(map(kinds, gpus_of(found).values())) == [["learner", "reference", "rollout"], ["learner", "rollout"]]


def test_who_evaluates_shares_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a learner, two samplers must not end on one GPU."""
    Simulated(Node("a", "", {"GPU": 2.0, "CPU": 8.0})).patch(monkeypatch)
    found = asyncio.run(reserve(bundles(0, 2, 1, 0, {}, gpu=True, share_gpus=True), 5.0, shared=True))
    assert [kinds(roles) for roles in gpus_of(found).values()] == [["rollout"], ["rollout"]]


@pytest.mark.parametrize("scorers", range(12))
def test_the_parts_are_one_gpu(scorers: int) -> None:
    learner, rollout, scorer = shares(scorers)
    assert 1 - 0.002 < learner + rollout + scorer * scorers <= 1 + CLOSE
    assert learner > 0.5
    assert rollout * 2 > 1 - learner


def test_parts_of_a_gpu_are_wanted_of_a_whole_one() -> None:
    two = side_by_side(bundles(2, 1, 1, 1, {"teacher:a-b": 1}, gpu=True, share_gpus=True))
    assert [[b.role for b in some] for some in two] == [["learner-0", "rollout-0", "teacher:a-b-0"], ["learner-1"]]


def test_what_is_missing_counts_whole_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(Node("a", "", {"GPU": 1.0, "CPU": 8.0})).patch(monkeypatch)
    wanted = bundles(2, 1, 1, 0, {}, gpu=True, share_gpus=True)
    with pytest.raises(PreflightError, match=r"RLKD-E020.*3 CPU needed; 2 GPU needed; no room for learner-0"):
        asyncio.run(reserve(wanted, 0.01, shared=True))


def test_a_trial_cannot_share_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = bundles(2, 2, 1, 0, {}, gpu=True, share_gpus=True)
    own = Group(0, [{"CPU": 1.0}, *(dict(b.resources) for b in wanted)], {})
    monkeypatch.setattr(placement, "get_current_placement_group", lambda: own)
    with pytest.raises(PreflightError, match=r"RLKD-E023.*2 GPUs that are shared"):
        asyncio.run(reserve(wanted, 1.0, shared=True))
    found = asyncio.run(reserve([wanted[0], wanted[2]], 1.0, shared=True))
    assert {"learner-0", "rollout-0"} < set(found.seats)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sampler.workers=2"], "sampler.workers=2 is more than learner.ranks=1"),
        (["sampler.max_workers=3"], "sampler.max_workers=3 is more than learner.ranks=1"),
        (["learner.ranks=2", "reference.workers=3"], "reference.workers=3 is more than learner.ranks=2"),
    ],
)
def test_who_shares_has_a_rank_beside_it(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(RECIPE, ["ray.share_gpus=true", *settings])
    load(RECIPE, settings)  # each on its own: no matter
    load(RECIPE, ["ray.share_gpus=true", *settings, "learner.ranks=4"])


# --- nodes that an autoscaler adds


def test_the_learner_has_its_place_before_others_ask_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is there; nodes for the learner come one by one, then one for the samplers. They must not take what the
    learner waits for."""
    stays = {"GPU": 2.0, "CPU": 8.0, STABLE: 1.0}
    nodes = [Node("head", "", {"CPU": 8.0, STABLE: 1.0}), Node("l1", "", stays), Node("l2", "", stays)]
    simulated = Simulated(*nodes, Node("spot", "", {"GPU": 4.0, "CPU": 8.0}))
    simulated.patch(monkeypatch)
    found = asyncio.run(reserve(bundles(4, 4, 1, 0, {}, gpu=True, stable=True), 2.0))
    where = {role: str(seat.node) for role, seat in found.seats.items()}
    assert {node for role, node in where.items() if role.startswith("learner")} == {"l1", "l2"}
    assert {node for role, node in where.items() if role.startswith("rollout")} == {"spot"}


def test_where_no_node_stays_everybody_asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler should hear of all of it."""
    simulated = Simulated(Node("head", "", {"CPU": 8.0}))
    simulated.patch(monkeypatch)
    asked: list[int] = []
    monkeypatch.setattr(placement, "_missing", lambda *_: str(asked.append(len(simulated.groups))))
    with pytest.raises(PreflightError, match="E020"):
        asyncio.run(reserve(bundles(1, 2, 1, 0, {}, gpu=True), 0.01))
    assert asked == [3]


def gpu_run(monkeypatch: pytest.MonkeyPatch, gpus: float, settings: list[str]) -> tuple[list[Bundle], list[str], str]:
    """What is asked of a cluster that so far has so many GPUs, what is told, and how it ends without room."""
    config, asked, told = load(RECIPE, settings), [], []

    async def full(wanted: Sequence[Bundle], *_: Any) -> Placement:
        asked.extend(wanted)
        raise PreflightError("RLKD-E020", "no room")

    async def settle(config: Config) -> None:
        async with AsyncExitStack() as stack:
            await site.settled(config, Path(), lambda *said: told.append(" ".join(said)), stack, 1, True, 1, {})

    monkeypatch.setattr(site, "reserve", full)
    monkeypatch.setattr(site, "alive", list)
    monkeypatch.setattr(site.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": gpus})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PreflightError) as end:
        asyncio.run(settle(config))
    return asked, told, end.value.problems[0].code


AWAY = ["ray.address=10.0.0.1:6379", "ray.wait_s=900"]


def test_gpus_that_are_not_there_yet_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told, code = gpu_run(monkeypatch, 0.0, [*AWAY, "model.device=cuda"])
    assert [b.resources.get("GPU") for b in asked] == [1.0, 1.0, None]
    assert told == []
    assert code == "RLKD-E021"  # after all that waiting
    assert gpu_run(monkeypatch, 1.0, [*AWAY, "model.device=cuda"])[2] == "RLKD-E020"  # there are some, too few


@pytest.mark.faults("F63")
def test_a_cluster_of_this_machine_gets_no_more_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _, code = gpu_run(monkeypatch, 0.0, ["ray.wait_s=900", "model.device=cuda"])
    assert (asked, code) == ([], "RLKD-E021")


def test_auto_takes_what_is_there_and_says_so_to_who_waits_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told, code = gpu_run(monkeypatch, 0.0, [*AWAY, "model.device=auto"])
    assert not any("GPU" in b.resources for b in asked)
    assert len(told) == 1
    assert "say model.device=cuda" in told[0]
    assert code == "RLKD-E020"
    assert gpu_run(monkeypatch, 0.0, [AWAY[0], "model.device=auto"])[1] == []  # who does not wait: no news
    assert gpu_run(monkeypatch, 0.0, [*AWAY, "model.device=cpu"])[1] == []
    assert "GPU" in gpu_run(monkeypatch, 2.0, [*AWAY, "model.device=auto"])[0][0].resources
