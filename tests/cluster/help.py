"""A Ray cluster of several nodes on this machine, each its own raylet, and a run on it that is watched from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group

from rlkd.chaos import end, steps
from rlkd.workers import drain
from rlkd.workers.nodes import STABLE
from rlkd.workers.placement import A_LITTLE, CPU_SHARE, NODE

ROOT = Path(__file__).parents[2]
STORE = 80 * 2**20  # bytes of a node's object store


class Nodes:
    """The cluster; this process is connected to it."""

    def __init__(self, ranks: int | None = None) -> None:
        """With its head, which stays if there is room for `ranks` of the learner."""
        resources = {} if ranks is None else {STABLE: 1}
        head = {"num_cpus": 1, "object_store_memory": STORE, "resources": resources, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        ray.init(address=self._cluster.address, log_to_driver=False, namespace="tests")
        self.head = drain.own_node()
        if ranks is not None:
            take(self.head, {STABLE: 1 - ranks * A_LITTLE})

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, seats: int | None = None, ranks: int | None = None) -> str:
        """A node's id. `seats`: with room for so many workers only; `ranks`: one that stays, for so many."""
        resources = {} if ranks is None else {STABLE: 1}
        node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE, resources=resources)
        self._nodes[node.node_id] = node
        if seats is not None:
            take(node.node_id, {"CPU": 1 - seats * CPU_SHARE})
        if ranks is not None:
            take(node.node_id, {STABLE: 1 - ranks * A_LITTLE})
        return str(node.node_id)

    def drain(self, node: str, seconds: float) -> None:
        drain.drain(node, seconds)

    def kill(self, node: str, number: int = signal.SIGKILL) -> None:
        """SIGKILL to its raylet: the workers there die with it, and nobody is told."""
        (raylet,) = self._nodes[node].all_processes["raylet"]
        os.kill(raylet.process.pid, number)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def take(node: str, resources: Mapping[str, float]) -> None:
    """Nobody else gets these, as long as this process is there."""
    taken = placement_group([dict(resources)], bundle_label_selector=[{NODE: node}])
    assert taken.wait(30), f"there is no {dict(resources)} on node {node[:8]}"


@contextmanager
def nodes(ranks: int | None = None) -> Iterator[Nodes]:
    there = Nodes(ranks)
    try:
        yield there
    finally:
        there.close()


@dataclass
class Run:
    """A driver in a process of its own."""

    process: "subprocess.Popen[bytes]"
    directory: Path
    log: Path

    @property
    def step(self) -> int:
        return steps(self.directory)

    def events(self, kind: str = "") -> list[str]:
        """Texts of events of a kind."""
        try:
            lines = (self.directory / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines]
        return [row["text"] for row in rows if kind in ("", row["kind"])]

    def actors(self) -> dict[str, dict[str, Any]]:
        """Who is where, by name."""
        rosters = sorted(self.directory.glob("attempts/*/pids.json"))
        try:
            found: dict[str, dict[str, Any]] = json.loads(rosters[-1].read_text())["actors"] if rosters else {}
        except ValueError:
            return {}
        return found

    def on(self, node: str) -> list[str]:
        """Who works on a node and is there."""
        return [name for name, row in self.actors().items() if row.get("node") == node and row["state"] != "is lost"]

    def ready(self, count: int, without: Sequence[str] = ()) -> bool:
        """Whether so many rollout workers are ready, none of them on these nodes."""
        rows = [row for name, row in self.actors().items() if name.startswith("rollout") and row["state"] == "is ready"]
        return len(rows) == count and not any(row["node"] in without for row in rows)

    def until(self, what: str, condition: Callable[[], bool], seconds: float = 240.0) -> float:
        """Wait for it; how long it took. AssertionError with the end of the log if the run ends before, or not then."""
        began = time.monotonic()
        while not condition():
            code = self.process.poll()
            assert code is None, f"the run ended with {code} before: {what}\n{self.tail()}"
            assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}\n{self.tail()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def end(self, seconds: float = 300.0) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {seconds:g} s\n{self.tail()}") from None

    def tail(self) -> str:
        return self.log.read_text()[-5000:]

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def started(
    recipe: Path, name: str, folder: Path, *overrides: str, program: str = "tests.cluster.child",
    prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None,
) -> Iterator[Run]:  # fmt: skip
    """A run, ended at the end of the context if it is still there."""
    command = [*prefix, sys.executable, "-m", program, "train", str(recipe), f"name={name}",
               f"report.directory={folder}", *overrides]  # fmt: skip
    log = folder / f"{name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, **(environment or {})})
    try:
        yield Run(process, folder / name, log)
    finally:
        end(process)
