"""A run on nodes that come and go: five nodes in all, one is drained, one killed, one joins. For the test, and for
benchmarks/nodes.py, which does it many times."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.chaos import Chaos, compared
from tests.chaos.recipe import recipe
from tests.cluster.help import Run, nodes, started
from tests.cluster.paced_engine import GATE

STEPS = 100
CHANGES: dict[str, Any] = {
    "schedule": {"steps": STEPS, "groups_per_step": 4, "staleness": 1},
    "learner": {"ranks": 2, "zero_stage": 2},
    "sampler": {"workers": 2, "min_workers": 1, "max_workers": 4},
    "checkpoint": {"every": 25},
}


@dataclass(frozen=True)
class Story:
    """What happened, with seconds from the cause to when all workers were there again."""

    moved_s: float  # after the drain and the new node
    replaced_s: float  # after the kill
    run_s: float
    steps_at: tuple[int, int]  # when the node was drained, when the other one was killed
    counts: dict[str, int]  # events by kind
    sent_mib: float
    report: dict[str, Any]  # of rlkd.chaos.compared


def quiet(folder: Path, model: Path) -> Path:
    """The folder of a run that is left in peace, on one node."""
    path = recipe(folder, model, **CHANGES)
    gate = folder / "open"
    gate.touch()
    with started(path, "quiet", folder / "runs", environment={GATE: str(gate)}) as run:
        assert run.end(280) == 0, run.tail()
    return run.directory


def disturbed(folder: Path, model: Path, peaceful: Path) -> Story:
    """The same run on nodes that come and go. AssertionError if anything is not as it must be."""
    folder.mkdir(parents=True, exist_ok=True)
    gate, path, began = folder / "open", recipe(folder, model, **CHANGES), time.monotonic()
    os.environ[GATE] = str(gate)
    with nodes(ranks=1) as cluster:
        second = cluster.add(ranks=1)
        first, other = cluster.add(seats=2), cluster.add(seats=2)
        with started(path, "run", folder / "runs", f"ray.address={cluster.address}") as run:
            run.until("three workers are there, the fourth has no room", lambda: run.ready(3) and run.step >= 3)
            _as_planned(run, cluster.head, second, {first, other})
            drained_at = run.step
            cluster.drain(first, 25.0)
            run.until("nobody is on the node that goes away", lambda: not run.on(first))
            third = cluster.add()
            moved_s = run.until("four workers are there", lambda: run.ready(4, [first]))
            assert run.on(third), run.actors()
            run.until("it goes on", lambda: run.step > drained_at + 2)
            killed_at = run.step
            cluster.kill(other)
            replaced_s = run.until("all are on the new node", lambda: run.ready(4, [first, other]))
            run.until("it goes on", lambda: run.step > killed_at + 2)
            gate.touch()
            assert run.end() == 0, run.tail()
        return _told(run, moved_s, replaced_s, (drained_at, killed_at), time.monotonic() - began, peaceful)


def _as_planned(run: Run, head: str, second: str, spot: set[str]) -> None:
    """The driver and a rank on the head, the other rank on the other node that stays, everybody else elsewhere."""
    where = {name: row.get("node") for name, row in run.actors().items() if row.get("node")}
    assert {where["learner-0"], where["learner-1"]} == {head, second}, where
    assert {node for name, node in where.items() if name.startswith(("rollout", "reward"))} == spot, where
    (told,) = run.events("placement")
    assert f"({head[:8]}, stable)" in told
    assert "the driver, learner-" in told, told


def _told(
    run: Run, moved_s: float, replaced_s: float, steps_at: tuple[int, int], seconds: float, peaceful: Path
) -> Story:
    found = compared(Chaos([], peaceful, (), 0, 1.0), Chaos([], run.directory, (), 0, 1.0))
    assert found["same_ledger"], found["text"]
    assert found["steps"] == STEPS
    assert found["twice"] == []
    assert len(run.events("preempted")) == 1, run.events()
    assert not run.events("learner_lost"), run.events()
    joined = [text for text in run.events("nodes") if "has joined" in text]
    gone = [text for text in run.events("nodes") if "is gone" in text]
    assert len(joined) == 1, run.events("nodes")
    assert gone, run.events("nodes")
    rows = run.metrics()
    assert {row["workers/rollout"] for row in rows} >= {3.0, 4.0}
    assert rows[-1]["sync/mib_to_other_nodes"] > 0
    counts: dict[str, int] = {}
    for kind in ("workers", "nodes", "preempted", "worker_lost", "stalled", "waiting"):
        counts[kind] = len(run.events(kind))
    sent = rows[-1]["sync/mib_to_other_nodes"]
    return Story(moved_s, replaced_s, seconds, steps_at, counts, sent, found)
