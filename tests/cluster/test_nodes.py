"""Runs on several nodes of one machine: learner ranks on two, workers on others, nodes that come and go."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rlkd.core.errors import PreflightError
from rlkd.models.get import get
from rlkd.workers.survey import survey
from tests.chaos.recipe import recipe
from tests.cluster.help import Nodes, nodes, started
from tests.cluster.scenario import disturbed, quiet

pytestmark = [pytest.mark.stack, pytest.mark.cluster, pytest.mark.timeout(600)]
REAL = {"rewards": {"arithmetic": {}}, "health": {"canary_every": 1}, "schedule": {"steps": 3, "groups_per_step": 4}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.long
@pytest.mark.faults("F10", "F12", "F13", "F15")
def test_a_node_is_drained_another_killed_and_a_new_one_used(tmp_path: Path, model: Path) -> None:
    """The ledger is that of a run in peace: every prompt once, in the same step."""
    story = disturbed(tmp_path / "run", model, quiet(tmp_path, model))
    assert story.steps_at[0] < story.steps_at[1]


@pytest.fixture(scope="module")
def three() -> Iterator[Nodes]:
    """A head and a node with room for one rank each, and one for workers."""
    with nodes(ranks=1) as cluster:
        cluster.add(ranks=1)
        cluster.add()
        yield cluster


@pytest.mark.parametrize("kind", ["auto", pytest.param("ray", marks=pytest.mark.long)])
def test_the_samplers_of_other_nodes_have_the_learners_weights(
    tmp_path: Path, model: Path, three: Nodes, kind: str
) -> None:
    """The canary compares what learner and samplers make of the same tokens, at every step."""
    path = recipe(tmp_path, model, learner={"ranks": 2}, sampler={"workers": 2, "max_tokens": 24}, **REAL)
    address = f"ray.address={three.address}"
    with started(path, kind, tmp_path, address, f"sync.kind={kind}", "learner.lr=0.01", program="rlkd") as run:
        assert run.end() == 0, run.tail()
    rows = run.metrics()
    assert len(rows) == 3
    assert all(row["mismatch/mean"] < 1e-3 for row in rows), rows
    assert rows[-1]["sync/mib_to_other_nodes"] > rows[0]["sync/mib_to_other_nodes"] > 0
    assert run.events("canary") == []
    assert not list(Path("/dev/shm").glob(f"rlkd-{kind}-*/*")), "weights are left in shared memory"


@pytest.mark.faults("F63")
def test_a_node_with_other_packages_is_refused(tmp_path: Path, three: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes of this machine have the same: as if the driver's were another."""
    others = {node["NodeID"]: None for node in ray.nodes() if node["Alive"]}
    asyncio.run(survey(others, three.head))
    monkeypatch.setattr("rlkd.workers.survey.PACKAGES", ("torch", "pytest"))
    monkeypatch.setattr("rlkd.workers.survey.version", lambda name: f"{name}-0.1")
    with pytest.raises(PreflightError) as caught:
        asyncio.run(survey({**others, second(three): tmp_path}, three.head))
    assert len(caught.value.problems) == 2  # but not for the driver's own node
    assert all("torch 2." in p.what and "there, torch-0.1 here" in p.what for p in caught.value.problems)
    assert not list(tmp_path.iterdir())  # nothing of the look is left


def second(cluster: Nodes) -> str:
    return next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != cluster.head)


@pytest.mark.long
@pytest.mark.faults("F63")
def test_more_than_there_is_room_for_is_said_with_what_each_node_has(tmp_path: Path, model: Path, three: Nodes) -> None:
    path = recipe(tmp_path, model, **REAL)
    began = time.monotonic()
    with started(path, "big", tmp_path, f"ray.address={three.address}", "learner.ranks=3", "ray.wait_s=5") as run:
        assert run.end() == 3, run.tail()
    assert time.monotonic() - began < 60
    said = run.tail()
    assert "RLKD-E020" in said
    assert "no room for learner-0 (0.1 CPU, on a stable node)" in said
    assert said.count("of 1 CPU") == 3  # a row for each node


@pytest.mark.long
def test_shared_memory_alone_keeps_everybody_on_one_node(tmp_path: Path, model: Path, three: Nodes) -> None:
    path = recipe(tmp_path, model, **REAL)
    overrides = (f"ray.address={three.address}", "sync.kind=shm", "schedule.steps=1")
    with started(path, "shm", tmp_path, *overrides, program="rlkd") as run:
        run.until("who is where", lambda: bool(run.events("placement")))
        (told,) = run.events("placement")
        assert run.end() == 0, run.tail()
    everybody = next(part for part in told.split("; ") if "learner-0" in part)
    assert "rollout-0" in everybody, told
