"""Nodes with their own addresses and their own shared memory: what only a real network shows."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkd.chaos import Chaos, compared
from rlkd.models.get import get
from tests.chaos.recipe import recipe
from tests.cluster.help import ROOT, started
from tests.cluster.network import Network, inside, network, possible
from tests.cluster.paced_engine import GATE
from tests.cluster.scenario import CHANGES, STEPS, quiet

pytestmark = [pytest.mark.stack, pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600),
              pytest.mark.skipif(possible() is not None, reason=str(possible()))]  # fmt: skip
STAYS = {"stable": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Two machines that stay, each with room for a rank, and two for workers."""
    monkeypatch.setenv(GATE, str(tmp_path / "open"))
    monkeypatch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # with a token in the home Ray's nodes ask for it
    with network() as net:
        for number in range(4):
            machine = net.machine()
            net.start(machine, tmp_path / f"{machine}.log", **(STAYS if number < 2 else {}))
            if number == 0:
                time.sleep(8)  # the others would give up
        hold = [sys.executable, "-m", "tests.cluster.hold", net.head]
        with subprocess.Popen(
            [*inside(net.machines[0]), *hold], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as holding:
            assert holding.stdout is not None
            assert holding.stdout.readline() == "held\n"
            yield net
            holding.kill()


@pytest.mark.faults("F12")
def test_a_partition_heals_or_the_node_is_replaced(tmp_path: Path, model: Path, four: Network) -> None:
    """Three seconds without a network are a slow call. Longer, and the node counts as dead: others do its work, and it
    is used again when it comes back as a new one."""
    peaceful, path = quiet(tmp_path, model), recipe(tmp_path, model, **CHANGES)
    (tmp_path / "open").unlink()
    head, _, cut, long = four.machines
    overrides = (f"ray.address={four.head}", "sampler.max_workers=2", "sampler.workers=2")
    with started(path, "run", tmp_path / "runs", *overrides, prefix=inside(head)) as run:
        run.until("two workers are there", lambda: run.ready(2) and run.step >= 3)
        hosts = run.events("placement")[0]
        assert all(f"10.77.0.{n} (" in hosts for n in (1, 2, 3, 4)), hosts
        before = len(run.events("worker_lost")) + len(run.events("nodes"))
        four.cut(cut)
        time.sleep(3)
        four.heal(cut)
        at = run.step
        run.until("it goes on", lambda: run.step > at + 4)
        assert len(run.events("worker_lost")) + len(run.events("nodes")) == before, run.events()

        four.cut(long)
        run.until("the node is dead", lambda: any(four.address(long) in t for t in run.events("nodes")), 60)
        run.until("its worker is somewhere else", lambda: run.ready(2), 120)
        four.heal(long)
        four.raylets[long].wait(60)  # Ray ends a raylet that it gave up
        four.start(long, tmp_path / "again.log")
        run.until("it has joined", lambda: any("has joined" in t for t in run.events("nodes")), 60)
        (tmp_path / "open").touch()
        assert run.end() == 0, run.tail()
    found = compared(Chaos([], peaceful, (), 0, 1.0), Chaos([], run.directory, (), 0, 1.0))
    assert found["same_ledger"], found["text"]
    assert found["steps"] == STEPS
    assert run.metrics()[-1]["sync/mib_to_other_nodes"] > 0


def test_a_folder_of_the_heads_own_is_refused(tmp_path: Path, model: Path, four: Network) -> None:
    """/tmp/own is another file system on every machine; the driver's is nobody else's either."""
    path = recipe(tmp_path, model, **CHANGES)
    own = Path("/tmp/own")  # see network.py
    shutil.rmtree(own, ignore_errors=True)
    began = time.monotonic()
    with started(path, "run", tmp_path / "logs", f"ray.address={four.head}", f"report.directory={own}",
                 prefix=inside(four.machines[0])) as run:  # fmt: skip
        assert run.end() == 3, run.tail()
    assert time.monotonic() - began < 90
    said = run.tail()
    assert "RLKD-E024" in said
    assert "10.77.0.2 (" in said
    assert "it does not see what the driver writes there" in said
    assert f"--> {own}/run" in said
    shutil.rmtree(own)
