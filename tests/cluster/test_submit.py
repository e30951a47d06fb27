"""Runs as jobs of a real Ray cluster on this machine: submitted, stopped in the middle, submitted again, compared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlkd.chaos import final_weights, ledger, steps
from rlkd.models.get import get
from tests.cluster.ray_head import ROOT, Head, end, environment, head, processes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = 24
CHANGES = {
    "schedule": {"steps": STEPS, "groups_per_step": 4, "on_no_signal": "skip_step"},  # answers are cut, and alike
    "algorithm": {"rollout": {"samples": 4}},
    "sampler": {"engine": "hf", "max_tokens": 16, "threads": 1},
    "learner": {"threads": 1},
    "checkpoint": {"every": 0},
    "evaluate": {"at_start": False, "at_end": False},
    "ray": {"object_store_gib": 0.1},
    "report": {"tensorboard": False},
    "deterministic": True,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head() as found:
        yield found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: the demo's recipe with few steps, its model, a reward of one's own."""
    folder = tmp_path_factory.mktemp("project")
    get("tiny", folder / "models/tiny")
    (folder / "configs").mkdir()
    (folder / "configs/demo.yaml").write_text((ROOT / "configs/grpo-tiny.yaml").read_text())
    (folder / "mine.py").write_text("def short(prompt, text):\n    return 1.0 / (1 + len(text))\n")
    recipe = {"defaults": ["configs/demo"], **CHANGES, "rewards": {"arithmetic": {}, "mine.py:short": {"weight": 0.1}}}
    (folder / "few.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def quiet(project: Path) -> Path:
    """The same run in peace, without any cluster."""
    done = rlkd(project, "train", "few.yaml", "name=quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    return project / "runs/quiet"


def rlkd(folder: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """To its end."""
    command = [sys.executable, "-m", "rlkd", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def ray_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ray's own command line, to its end."""
    env = environment(RAY_AUTH_MODE="token")
    return subprocess.run(["ray", *arguments], env=env, capture_output=True, text=True, timeout=120, check=False)


class Started:
    """A command that goes on beside the test; its output is in files."""

    def __init__(self, folder: Path, command: list[str], **more: str) -> None:
        self.out, self.err = (folder / f"{time.monotonic_ns()}.{kind}" for kind in ("out", "err"))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**environment(PYTHONPATH=str(ROOT)), **more}, stdout=out, stderr=err
            )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process.pid)

    def said(self) -> str:
        return self.err.read_text() + self.out.read_text()

    def until(self, true: Callable[[], Any], seconds: float = 200) -> None:
        limit = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, f"it ended too early:\n{self.said()[-4000:]}"
            assert time.monotonic() < limit, f"nothing in {seconds:.0f} s:\n{self.said()[-4000:]}"
            time.sleep(0.1)


def submit(folder: Path, cluster: Head, name: str, *more: str) -> Started:
    command = [sys.executable, "-m", "rlkd", "submit", "few.yaml", f"name={name}", "--ray", cluster.address]
    return Started(folder, [*command, "--pause", "0", *more])


@contextmanager
def hanging(cluster: Head) -> Iterator[None]:
    """Its dashboard does not answer, within the context; the connections stay."""
    (dashboard,) = processes("dashboard/dashboard.py", f"--port={cluster.dashboard}")
    dashboard.suspend()
    try:
        yield
    finally:
        dashboard.resume()


def whole(run: Path) -> None:
    """Every step was made, and no prompt twice."""
    tickets = Counter(row[0] for rows in ledger(run).values() for row in rows)
    assert [t for t, n in tickets.items() if n > 1] == []
    assert sorted(ledger(run)) == list(range(1, STEPS + 1))


def same(run: Path, quiet: Path) -> None:
    """As chaos.py compares: every prompt in the same step; and the same weights, bit by bit."""
    assert ledger(run) == ledger(quiet)
    assert final_weights(run) == final_weights(quiet)


def status(project: Path, cluster: Head, name: str) -> list[dict[str, Any]]:
    done = rlkd(project, "status", name, "--ray", cluster.address, "--json")
    assert done.returncode == 0, done.stderr
    attempts: list[dict[str, Any]] = json.loads(done.stdout)["attempts"]
    return attempts


@pytest.mark.faults("F11", "F69")
@pytest.mark.parametrize("compared", [False, pytest.param(True, marks=pytest.mark.long)], ids=["alone", "compared"])
def test_a_run_is_stopped_in_the_middle_and_submitted_again_by_itself(
    cluster: Head, project: Path, compared: bool, request: pytest.FixtureRequest
) -> None:
    name = "compared" if compared else "again"
    run = project / "runs" / name
    with submit(project, cluster, name, "--retries", "2") as client:
        client.until(lambda: steps(run) >= 4)
        stopped = rlkd(project, "stop", name, "--ray", cluster.address)
        assert stopped.returncode == 0, stopped.stderr
        assert re.search(rf"{name}-1: exit 75 \(preempt\); SIGTERM: saved step \d+ of 24", stopped.stderr)
        assert "submits it again (up to 2 times)" in stopped.stderr
        assert "saved step" in stopped.stdout  # the save is shown
        client.process.wait(300)
    assert client.process.returncode == 0, client.said()[-4000:]
    said = client.err.read_text()
    assert re.search(r"package \d+\.?\d* [kM]B \(\d+ files; left out runs/", said)
    assert re.search(r"preflight on the cluster: ok \(needs 0\.\d CPU; free: \S+ \(head\) [\d.]+ of 4 CPU\)", said)
    assert re.search(rf"job {name}-1  attempt 1   stop grace \d+ s \(a save takes \d+ s, reckoned\)", said)
    assert re.search(rf"job {name}-2 .*stop grace \d+ s \(a save takes \d+ s, measured\)", said)
    first, second = status(project, cluster, name)
    assert (first["status"], first["exit"], second["status"], second["exit"]) == ("STOPPED", 75, "SUCCEEDED", 0)
    assert 4 <= first["saved"] < STEPS
    whole(run)
    if compared:
        same(run, request.getfixturevalue("quiet"))


@pytest.mark.long
@pytest.mark.faults("F69")
def test_the_dashboard_hangs_and_the_platform_asks_the_driver_to_go(cluster: Head, project: Path) -> None:
    """The client sees every line once, and submits again what Ray calls FAILED with 75."""
    run = project / "runs/hangs"
    with submit(project, cluster, "hangs", "schedule.steps=500") as client:
        client.until(lambda: steps(run) >= 1)
        with hanging(cluster):
            client.until(lambda: "the dashboard does not answer" in client.err.read_text())
        client.until(lambda: "the dashboard answers again" in client.err.read_text())
        (driver,) = processes("rlkd.submit.entry", str(run))
        driver.send_signal(signal.SIGTERM)
        client.until(lambda: "job hangs-2" in client.err.read_text())
        saved = status(project, cluster, "hangs")[0]["saved"]
        client.until(lambda: steps(run) > saved)
        assert rlkd(project, "stop", "hangs", "--for-good", "--ray", cluster.address).returncode == 0
        client.process.wait(60)
    first, second = status(project, cluster, "hangs")
    assert (first["status"], first["exit"], second["status"], second["exit"]) == ("FAILED", 75, "STOPPED", 75)
    numbers = [int(n) for n in re.findall(r"^step (\d+)/500", client.out.read_text(), re.MULTILINE)]
    assert numbers == list(range(1, steps(run) + 1))


@pytest.mark.long
def test_stop_for_good_ends_the_client_too(cluster: Head, project: Path) -> None:
    run = project / "runs/good"
    with submit(project, cluster, "good", "schedule.steps=500") as client:
        client.until(lambda: steps(run) >= 1)
        stopped = rlkd(project, "stop", "good", "--for-good", "--ray", cluster.address)
        assert stopped.returncode == 0, stopped.stderr
        client.process.wait(60)
    assert client.process.returncode == 75
    assert "stopped good for good" in client.err.read_text()
    assert [row["id"] for row in status(project, cluster, "good")] == ["good-1"]


@pytest.mark.long
def test_ctrl_c_lets_go_and_the_same_command_follows_again(cluster: Head, project: Path) -> None:
    run = project / "runs/go"
    with submit(project, cluster, "go", "schedule.steps=500") as client:
        client.until(lambda: steps(run) >= 1)
        client.process.send_signal(signal.SIGINT)
        client.process.wait(30)
    assert client.process.returncode == 130
    assert "let go: go-1 goes on" in client.err.read_text()
    assert status(project, cluster, "go")[-1]["status"] == "RUNNING"
    other = rlkd(project, "submit", "few.yaml", "name=go", "--ray", cluster.address)
    assert (other.returncode, "RLKD-E237" in other.stderr) == (3, True)
    with submit(project, cluster, "go", "schedule.steps=500") as client:
        client.until(lambda: "go-1 is RUNNING already, with this package" in client.err.read_text())
        client.until(lambda: "step 1/500" in client.out.read_text())
        os.kill(client.process.pid, signal.SIGINT)
        client.process.wait(30)
    assert rlkd(project, "stop", "go", "--ray", cluster.address).returncode == 0


@pytest.mark.long
def test_the_line_that_is_documented_does_the_same(cluster: Head, project: Path, quiet: Path) -> None:
    """launch/submit.sh, which is that line: submitted, stopped, submitted again by hand."""
    run, script = project / "runs/hand", str(ROOT / "launch/submit.sh")
    line = [script, cluster.address, "hand", "1", "few.yaml", f"model.path={project}/models/tiny"]
    with Started(project, line, RAY_AUTH_MODE="token") as client:
        client.until(lambda: steps(run) >= 4)
        asked = ray_cli("job", "stop", "--address", cluster.address, "hand-1")
        assert asked.returncode == 0, asked.stdout + asked.stderr
        client.process.wait(120)
    (first,) = status(project, cluster, "hand")
    assert (first["status"], first["exit"]) == ("STOPPED", 75)
    line[3] = "2"
    with Started(project, line, RAY_AUTH_MODE="token") as client:
        client.process.wait(300)
    assert client.process.returncode == 0, client.said()[-4000:]
    assert [row["exit"] for row in status(project, cluster, "hand")] == [75, 0]
    whole(run)
    same(run, quiet)


@pytest.mark.long
def test_without_the_grace_ray_kills_a_save_that_takes_longer(cluster: Head, project: Path) -> None:
    """What the grace is for: the same job with a save of five seconds, and Ray's own three."""
    (project / "slow.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(5)\n    print('(exit 75)', flush=True)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    ends = {}
    for name, grace in (("without", None), ("with", "20")):
        env = {} if grace is None else {"RAY_JOB_STOP_WAIT_TIME_S": grace}
        line = ["job", "submit", "--address", cluster.address, "--submission-id", f"{name}-1", "--no-wait"]
        line += ["--runtime-env-json", json.dumps({"env_vars": env}), "--", "python", str(project / "slow.py")]
        assert ray_cli(*line).returncode == 0
        limit = time.monotonic() + 60
        while "ready" not in status(project, cluster, name)[0]["says"]:
            assert time.monotonic() < limit
        stopped = rlkd(project, "stop", name, "--ray", cluster.address)
        ends[name] = stopped.returncode, status(project, cluster, name)[0]["exit"]
        assert ("without RAY_JOB_STOP_WAIT_TIME_S" in stopped.stderr) == (grace is None)
    assert ends == {"without": (6, None), "with": (0, 75)}


@pytest.mark.faults("F63")
def test_too_little_room_is_told_at_once(cluster: Head, project: Path) -> None:
    done = rlkd(project, "submit", "few.yaml", "name=large", "--ray", cluster.address, "verifier.workers=100")
    assert done.returncode == 3, done.stderr
    assert re.search(
        r"RLKD-E232.*needs 10\.2 CPU; missing: [\d.]+ CPU more; free: \S+ \(head\) [\d.]+ of 4 CPU", done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_model_that_is_not_there_is_told_before_anything_starts(cluster: Head, project: Path) -> None:
    done = rlkd(project, "submit", "few.yaml", "model.path=/no/such/model", "--ray", cluster.address)
    assert (done.returncode, "/no/such/model is not on" in done.stderr) == (3, True), done.stderr


@pytest.mark.long
def test_a_python_that_is_not_there_is_told(cluster: Head, project: Path) -> None:
    done = rlkd(project, "submit", "few.yaml", "name=snake", "--python", "python9", "--ray", cluster.address)
    assert (done.returncode, "RLKD-E238" in done.stderr, "python9" in done.stderr) == (3, True, True), done.stderr
