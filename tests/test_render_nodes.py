"""Which nodes a recipe's actors need."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkd.core.errors import ConfigError
from rlkd.render.nodes import Layout, Machine, Needs, Packed, by_kind, equal_node, packed

NODE, SMALL = Machine(8, 64, 512), Machine(0, 8, 32)


def needs(ranks: int, workers: int, tensors: int = 1, scorers: int = 0, rewards: int = 1, **more: Any) -> Needs:
    more.setdefault("least_rollout", workers)
    return Needs((1.0,) * ranks, (float(tensors),) * workers, (1.0,) * scorers, rewards, **more)


def shown(layout: Layout) -> list[tuple[str, int, int, bool]]:
    return [(k.name, k.count, k.machine.gpus, k.stable) for k in layout.kinds]


def test_roles_are_read_from_the_runs_own_bundles() -> None:
    from rlkd.workers.placement import bundles

    asked = bundles(2, 3, 4, 2, {"reference": 1, "teacher:big": 2, "writer:x-y": 1}, gpu=True)
    found = Needs.of([(b.role, b.resources) for b in asked], 2, False)
    assert found == Needs((1.0, 1.0), (4.0,) * 3, (1.0,) * 4, 2, 2)
    on_cpu = bundles(1, 1, 1, 1, {}, gpu=False)
    assert Needs.of([(b.role, b.resources) for b in on_cpu], 5, False) == Needs((0.0,), (0.0,), (), 1, 1)


def test_the_learner_is_on_the_head_if_one_node_holds_it() -> None:
    found = shown(by_kind(needs(4, 4, rewards=2), NODE, SMALL))
    assert found == [("head", 1, 4, True), ("rollout", 1, 4, False), ("reward", 1, 0, False)]


def test_a_large_learner_has_whole_nodes() -> None:
    layout = by_kind(needs(64, 16, tensors=4, scorers=3, rewards=9, least_rollout=5), NODE, SMALL)
    assert shown(layout) == [
        ("head", 1, 0, True), ("learner", 8, 8, True), ("rollout", 8, 8, False), ("scorer", 1, 3, False),
        ("reward", 2, 0, False),
    ]  # fmt: skip
    (rollout,) = [k for k in layout.kinds if k.name == "rollout"]
    assert rollout.least == 3  # five workers, two on a node
    assert layout.nodes == 20
    assert packed(needs(64, 16, tensors=4, scorers=3), NODE) == Packed(17, 8, idle=5)


def test_idle_gpus_are_told() -> None:
    layout = by_kind(needs(4, 3, tensors=4), NODE, SMALL)
    assert layout.notes == ("4 of the 16 GPUs of the rollout nodes stay idle",)


def test_without_gpus_each_sampler_has_a_node() -> None:
    wanted = Needs((0.0,), (0.0, 0.0), (0.0,), 3, 1)
    layout = by_kind(wanted, Machine(0, 2, 8), SMALL)
    assert shown(layout) == [
        ("head", 1, 0, True),
        ("rollout", 2, 0, False),
        ("scorer", 1, 0, False),
        ("reward", 2, 0, False),
    ]
    assert layout.kinds[1].least == 1
    assert packed(wanted, Machine(0, 2, 8)) == Packed(1, 1)


def test_who_shares_gpus_is_on_one_kind_of_nodes() -> None:
    assert shown(by_kind(needs(8, 8, shared=True), NODE, SMALL)) == [("head", 1, 8, True)]
    assert shown(by_kind(needs(16, 16, shared=True), NODE, SMALL)) == [("head", 1, 8, True), ("learner", 1, 8, True)]
    assert packed(needs(16, 16, shared=True), NODE) == Packed(2, 2)
    assert packed(needs(2, 2, shared=True), NODE) == Packed(1, 1, idle=6)


def test_the_learners_nodes_are_marked_unless_others_need_their_room() -> None:
    """A run puts nobody else on marked nodes (workers/placement.py): it would never find its places."""
    assert packed(needs(8, 8), NODE).stable == 1
    assert packed(needs(16, 16), NODE).stable == 2
    assert packed(needs(4, 12), NODE) == Packed(2, 1, apart=False)
    assert packed(needs(4, 12), NODE).stable == 0
    assert packed(needs(8, 8, rewards=56), NODE).stable == 1
    assert packed(needs(8, 8, rewards=57), NODE).stable == 0  # a CPU each
    assert packed(needs(4, 4), NODE).stable == 1  # the only node


@given(
    st.integers(1, 32), st.integers(1, 20), st.sampled_from([1, 2, 4, 8]), st.integers(0, 9), st.integers(1, 20),
    st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip
def test_every_actor_has_its_gpus(
    ranks: int, workers: int, tensors: int, scorers: int, rewards: int, gpus: int
) -> None:
    node = Machine(gpus, 64, 512)
    wanted = needs(ranks, workers, tensors, scorers, rewards)
    if tensors > gpus or (ranks > gpus and ranks % gpus):
        for how in (lambda: by_kind(wanted, node, SMALL), lambda: packed(wanted, node)):
            with pytest.raises(ConfigError, match="C442"):
                how()
        return
    layout = by_kind(wanted, node, SMALL)
    have = {k.name: k.count * k.machine.gpus for k in layout.kinds}
    assert have["head"] + have.get("learner", 0) == ranks
    assert have["rollout"] >= workers * tensors
    assert have.get("scorer", 0) >= scorers
    assert all(1 <= k.least <= k.count and k.machine.gpus <= gpus and k.machine.cpus >= 1 for k in layout.kinds)
    assert [k.name for k in layout.kinds if k.stable] == ["head", "learner"][: 1 + (ranks > gpus)]
    equal = packed(wanted, Machine(gpus, 30, 512))
    assert ranks + workers * tensors + scorers + equal.idle == equal.nodes * gpus
    assert (equal.with_learner - 1) * gpus < ranks <= max(equal.with_learner * gpus, gpus)
    if 0 < equal.stable < equal.nodes:
        assert workers * tensors + scorers <= (equal.nodes - equal.stable) * gpus
        assert workers + scorers + rewards <= (equal.nodes - equal.stable) * 30


def test_nodes_of_ranks_have_the_memory_that_ranks_need() -> None:
    """An optimizer that is offloaded lies in the node's memory, and 64 GiB a GPU are not always enough."""
    plain = needs(2, 1)
    heavy = replace(plain, rank_gib=100.0, node_gib=28.5)
    machines = [k.machine for k in by_kind(heavy, NODE, SMALL).kinds]
    assert machines == [Machine(2, 16, 229), Machine(1, 8, 64), SMALL]
    assert by_kind(plain, NODE, SMALL).head.machine == Machine(2, 16, 128)
    assert equal_node(heavy, NODE) == NODE
    assert equal_node(replace(heavy, rank_gib=300.0), NODE).memory_gib == 629
    whole = replace(needs(16, 1), rank_gib=100.0, node_gib=28.5)
    assert [k.machine.memory_gib for k in by_kind(whole, NODE, SMALL).kinds] == [32, 829, 64, 32]
    assert {k.machine.memory_gib for k in by_kind(replace(whole, shared=True), NODE, SMALL).kinds} == {829}
    cpus = Needs((0.0, 0.0), (0.0,), (), 1, 1, rank_gib=10.0, node_gib=4.0)
    assert [k.machine.memory_gib for k in by_kind(cpus, Machine(0, 4, 16), SMALL).kinds] == [24, 16, 16]
    assert Needs.most([plain, heavy]).memory_gib(2) == 229
