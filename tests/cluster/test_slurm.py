"""The rendered batch script with real Ray and real rlkd: two Ray nodes on this machine; srun and scontrol stand in."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlkd.models.get import get
from rlkd.render.job import Job
from rlkd.render.nodes import Machine
from rlkd.render.platforms import slurm
from rlkd.render.settings import Settings
from tests.cluster.ray_head import ROOT, end, environment, processes
from tests.test_render_slurm import STUBS, Run

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]
JOB = 30_000 + os.getpid() % 9_000  # makes the port of Ray's head
RECIPE = {
    "defaults": ["configs/grpo-tiny"],
    "schedule": {"steps": 500, "groups_per_step": 4, "on_no_signal": "skip_step"},  # cut answers earn nothing
    "algorithm": {"rollout": {"samples": 4}},
    "sampler": {"engine": "hf", "max_tokens": 16, "threads": 1},
    "learner": {"threads": 1},
    "checkpoint": {"every": 0},
    "evaluate": {"at_start": False, "at_end": False},
    "report": {"tensorboard": False},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What all nodes see, and the commands that stand in for Slurm's."""
    get("tiny", tmp_path / "models/tiny")
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/grpo-tiny.yaml", tmp_path / "configs")
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(RECIPE))
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "srun").symlink_to(STUBS / "srun")
    scontrol = (STUBS / "scontrol").read_text().replace("printf 'node%d\\n' 1 2 3", "echo 127.0.0.1")
    for name, text in (("scontrol", scontrol), ("rlkd", f'#!/bin/bash\nexec {sys.executable} -m rlkd "$@"\n')):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    job = Job("few", "few.yaml", ("name=few", "ray.wait_s=60"), str(folder), 60, False, "2.60.0", "Rendered by: a test")
    text = slurm(job, 2, 1, Machine(0, 2, 8), Settings("rlkd:cpu", str(folder)))["job.sbatch"]
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    more = {**environment(PYTHONPATH=str(ROOT)), "PATH": path, "SLURM_JOB_ID": str(JOB), "RLKD_STOP_WAIT": "20"}
    started = Run(folder, text, **more)
    yield started
    for group in [started.process.pid, *map(int, (folder / "tasks").read_text().split())]:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    for ray in processes(f"rlkd-{JOB}"):  # Ray's nodes are in sessions of their own
        end(ray.pid)
    shutil.rmtree(f"/tmp/rlkd-{JOB}", ignore_errors=True)


def test_slurms_notice_in_the_middle_of_a_run(run: Run, folder: Path) -> None:
    run.until("runs/few/metrics.jsonl", 240)
    until = time.monotonic() + 120
    while not (folder / "runs/few/metrics.jsonl").read_text():
        assert time.monotonic() < until, run.calls()
        time.sleep(0.1)
    run.signal_steps()
    code, said = run.end(120)
    log = "\n".join(p.read_text()[-2000:] for p in folder.glob("*-ray-*.log"))
    assert code == 75, f"{said[-3000:]}\n{log}"
    assert f"scontrol requeue {JOB}" in run.calls()
    ended = json.loads(next((folder / "runs/few/attempts").glob("*/exit.json")).read_text())
    assert (ended["code"], ended["class"]) == (75, "preempt")
    assert ended["saved"] == ended["step"] >= 1
    assert (folder / f"runs/few/checkpoints/step-{ended['saved']:06d}/MANIFEST.json").is_file()
    assert run.left() == []
    assert not Path(f"/tmp/rlkd-{JOB}").exists()
    events = [json.loads(line) for line in (folder / "runs/few/events.jsonl").read_text().splitlines()]
    (placed,) = [e["text"] for e in events if e["kind"] == "placement"]
    on = {role: "stable" in place for place in placed.split("; ") for role in place.split(" on ")[0].split(", ")}
    assert (on["learner-0"], on["rollout-0"]) == (True, False), placed
