"""Every command of docs/cluster.md is executed. What would go on for long gets settings that make it short; what needs
a platform that is not here (Kubernetes, SLURM, docker, a cloud) is a stand-in that looks at its files."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkd import cli
from rlkd.chaos import steps
from rlkd.models.get import get
from tests.cluster.ray_head import BIN, ROOT, Head, end, environment, free_ports, head

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
HERE = ("rlkd plan configs", "rlkd render")
ELSEWHERE = ("kubectl", "sbatch", "docker", "ray up")
CLUSTER = ("ray start", "rlkd train", "rlkd plan --check", "rlkd submit", "rlkd status", "rlkd logs", "rlkd stop",
           "rlkd sweep", "launch/submit.sh")  # fmt: skip
SHORT = ["sampler.engine=hf", "sampler.max_tokens=8", "evaluate.at_start=false", "evaluate.prompts=8",
         "algorithm.rollout.samples=2", "schedule.groups_per_step=2", "ray.object_store_gib=0.1"]  # fmt: skip
ADDED = {
    "rlkd train": SHORT,
    "rlkd submit": [*SHORT, "--pause", "0"],
    "launch/submit.sh": SHORT,
    "rlkd sweep": [*SHORT, "schedule.steps=6", "evaluate.every=3", "--trials", "2"],
    "rlkd plan --check": ["--no-calibrate"],
}
STAND_IN = """#!/bin/sh
echo "$(basename $0) $*" >> "$CALLS"
for word; do case $word in */*.yaml|*/*.sbatch|*/Dockerfile) [ -s "$word" ] || exit 9 ;; esac; done
"""


def commands(*beginnings: str) -> list[str]:
    """Those of the page, in its order, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    lines = [
        re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line and line.startswith(beginnings or "")]


def test_each_is_executed_by_one_of_these() -> None:
    assert len(commands()) >= 15
    assert set(commands()) == {*commands(*HERE), *commands(*ELSEWHERE), *commands(*CLUSTER)}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as the page takes it for granted."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    get("tiny", tmp_path / "models/tiny")
    return tmp_path


@pytest.mark.cluster
def test_plans_and_files_for_platforms(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    for command in commands(*HERE):
        done = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}"
    (project / "bin").mkdir()
    for name in ("kubectl", "sbatch", "docker", "ray"):
        (project / "bin" / name).write_text(STAND_IN)
        (project / "bin" / name).chmod(0o755)
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for command in commands(*ELSEWHERE):
        run = subprocess.run(["sh", "-c", command], env={**os.environ, "PATH": path, "CALLS": str(project / "calls")})
        assert run.returncode == 0, command
    assert (project / "calls").read_text().splitlines() == commands(*ELSEWHERE)


@contextmanager
def joined(command: list[str], log: Path) -> Iterator[None]:
    """`ray start` of a further node, until the context ends."""
    agent, grpc, metrics = free_ports(3)
    more = ["--block", "--num-cpus=4", "--disable-usage-stats", "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}"]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *more], env=environment(RAY_AUTH_MODE="token"), cwd="/", stdout=out, stderr=out
        )
    try:
        yield
    finally:
        end(process.pid)


def told(command: str, cluster: Head) -> list[str]:
    """With this cluster's addresses, and what makes it short."""
    here = command.replace("http://HEAD:8265", cluster.address).replace("HEAD:6379", cluster.gcs)
    added = next((more for beginning, more in ADDED.items() if command.startswith(beginning)), [])
    return [*shlex.split(here.replace("$PWD", os.getcwd())), *added]


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_cluster_and_what_runs_on_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    first, second, *others = sorted(commands(*CLUSTER), key=lambda c: c.startswith("rlkd plan --check"))  # of a run
    assert first.startswith("ray start --head")
    assert second.startswith("ray start --address")
    with ExitStack() as stack:
        cluster = stack.enter_context(head(more=shlex.split(first)[3:]))
        stack.enter_context(joined([str(BIN / "ray"), *told(second, cluster)[1:]], project / "second.log"))
        env = environment(RAY_AUTH_MODE="token", PYTHONPATH=str(ROOT), RUNS=str(project / "runs"))
        until = time.monotonic() + 60
        while subprocess.run([BIN / "ray", "status", "--address", cluster.gcs], env=env, capture_output=True,
                             text=True).stdout.count("node_") < 2:  # fmt: skip
            assert time.monotonic() < until, (project / "second.log").read_text()
            time.sleep(1)
        for command in others:
            done = subprocess.run(told(command, cluster), env=env, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}\n{done.stdout[-2000:]}"
        for name in ("nodes", "demo", "plain"):
            assert steps(project / "runs" / name) == 10
        assert (project / "runs/sweep-grpo-tiny/report.html").exists()
