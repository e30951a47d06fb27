"""The batch script: what Slurm reads in it, shellcheck, and runs with stand-ins for srun, ray, rlkd and scontrol."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rlkd.render.job import Job
from rlkd.render.nodes import Machine
from rlkd.render.platforms import slurm
from rlkd.render.settings import Settings
from tests.render_help import CLUSTER, ROOT, shellcheck

pytestmark = pytest.mark.stack  # the scripts run, with stand-ins for the commands
STUBS = Path(__file__).parent / "render_stubs"
SCRIPTS = [*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")]
Until = Callable[[str], None]


def script(folder: Path, nodes: int = 3, stable: int = 2, grace_s: int = 90) -> str:
    job = Job("demo.1", "a recipe.yaml", ("seed=1",), str(folder), grace_s, False, "2.60.0", "Rendered by: x")
    said = Settings("rlkd:cpu", str(folder), retries=2, sbatch=("--partition=gpu",))
    return slurm(job, nodes, stable, Machine(0, 2, 8), said)["job.sbatch"]


class Run:
    """The script at work in `folder`, as Slurm starts it."""

    def __init__(self, folder: Path, text: str, **environment: str) -> None:
        self.folder, self.text = folder, text
        self.environment = {
            **os.environ, "PATH": f"{STUBS}:{os.environ['PATH']}", "STUBS": str(folder), "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "demo-1", "SLURM_JOB_NODELIST": "node[1-3]", "RLKD_STOP_WAIT": "60",
            "RAYS": "3", **environment,
        }  # fmt: skip
        (folder / "job.sbatch").write_text(text)
        self.process = subprocess.Popen(
            ["bash", str(folder / "job.sbatch")], cwd=folder, env=self.environment, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def until(self, name: str, seconds: float = 30) -> None:
        """This file is there."""
        end = time.monotonic() + seconds
        while not (self.folder / name).exists():
            assert time.monotonic() < end, self.calls()
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def signal_steps(self) -> None:
        """As Slurm does for --signal=TERM@…: to the process group of every task, not to the batch script."""
        for task in (self.folder / "tasks").read_text().split():
            os.killpg(int(task), signal.SIGTERM)

    def end(self, seconds: float = 60) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def left(self) -> list[int]:
        """Tasks that are still alive."""
        tasks = [int(t) for t in (self.folder / "tasks").read_text().split()]
        return [t for t in tasks if Path(f"/proc/{t}").exists()]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(text: str | None = None, **environment: str) -> Run:
        runs.append(Run(tmp_path, script(tmp_path) if text is None else text, **environment))
        return runs[-1]

    yield start
    (tmp_path / "up").unlink(missing_ok=True)  # ends the stand-ins for Ray that are left
    for run in runs:
        for group in [run.process.pid, *map(int, _read(tmp_path / "tasks"))]:
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def _read(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def test_what_slurm_reads(tmp_path: Path) -> None:
    lines = [line.removeprefix("#SBATCH ") for line in script(tmp_path).splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "--job-name=demo-1", "--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=8G", "--time=24:00:00",
        "--output=%x-%j.log", "--open-mode=append", "--requeue", "--no-kill", "--signal=TERM@90", "--partition=gpu",
    ]  # fmt: skip
    text = script(tmp_path)
    before = text[: text.rindex("#SBATCH")].splitlines()
    assert all(line.startswith("#") for line in before), "sbatch stops reading at the first command"
    big = (CLUSTER / "dapo-qwen2.5-32b/slurm/job.sbatch").read_text()
    assert "#SBATCH --nodes=16\n" in big
    assert "#SBATCH --gpus-per-node=8\n" in big


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    """Neither of the scripts, nor of what is inside the RayJobs."""
    inside = []
    for number, file in enumerate(CLUSTER.rglob("rayjob.yaml")):
        (config, _) = yaml.safe_load_all(file.read_text())
        inside.append(tmp_path / f"{number}.sh")
        inside[-1].write_text(config["data"]["train.sh"])
    assert len(SCRIPTS) == 3
    assert len(inside) == 2
    assert shellcheck(*SCRIPTS, *inside) == ""


def test_shellcheck_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text(script(tmp_path).replace('"$head"', "$head"))
    assert "SC2086" in shellcheck(tmp_path / "x.sh")


def test_the_scripts_that_are_started_may_be() -> None:
    assert [p for p in SCRIPTS if not os.access(p, os.X_OK)] == []
    assert ROOT in CLUSTER.parents


def test_a_run_to_its_end(tmp_path: Path, started: Callable[..., Run]) -> None:
    run = started(ENDS="0")
    code, said = run.end()
    assert code == 0, said
    calls = run.calls()
    rays = sorted(c for c in calls if c.startswith("ray start"))
    common = "--block --num-cpus=2 --num-gpus=0 --disable-usage-stats"
    port = 20000 + 4711
    stable = '--resources={"stable": 1}'
    assert rays == [
        f"ray start {common} --address=node1:{port} {stable} procid=0 grace=90",
        f"ray start {common} --address=node1:{port} procid=1 grace=90",
        f"ray start {common} --head --port={port} --include-dashboard=false --temp-dir=/tmp/rlkd-4711 {stable} "
        "procid=0 grace=90",
    ]
    (rlkd,) = [c for c in calls if c.startswith("rlkd train")]
    assert rlkd == f"rlkd train a recipe.yaml seed=1 in {tmp_path} address=node1:{port}"
    assert not any("requeue" in c for c in calls)
    assert run.left() == []
    assert "ended with exit code 0" in said


@pytest.mark.parametrize("code", [2, 6])
def test_other_ends_are_not_repeated(code: int, started: Callable[..., Run]) -> None:
    run = started(ENDS=str(code))
    assert run.end()[0] == code
    assert not any("requeue" in c for c in run.calls())
    assert run.left() == []


def test_slurms_term_reaches_rlkd_and_ray_stands_until_it_has_saved(started: Callable[..., Run]) -> None:
    run = started(ENDS="term")
    run.until("training")
    run.signal_steps()
    code, said = run.end()
    calls = run.calls()
    assert code == 75, said
    saved = calls.index("rlkd-saved")
    gone = [i for i, call in enumerate(calls) if call.startswith("ray-gets-term")]
    assert len(gone) == 3
    assert min(gone) > saved
    assert calls.index("scontrol requeue 4711") > max(gone)
    assert "saved, and queued again" in said
    assert run.left() == []


def test_without_setsid_ray_would_go_first(tmp_path: Path, started: Callable[..., Run]) -> None:
    """The test above finds it, if the protection is missing."""
    run = started(script(tmp_path).replace("  setsid ray start", "  ray start"), ENDS="term")
    run.until("training")
    run.signal_steps()
    run.end()
    calls = run.calls()
    assert min(i for i, call in enumerate(calls) if call.startswith("ray-gets-term")) < calls.index("rlkd-saved")


def test_a_cancelled_job_saves_and_does_not_come_back(started: Callable[..., Run]) -> None:
    """scancel: TERM to the steps and to the batch script."""
    run = started(ENDS="term")
    run.until("training")
    run.process.send_signal(signal.SIGTERM)
    run.signal_steps()
    code, said = run.end()
    assert code == 75
    assert "rlkd-saved" in run.calls()
    assert not any("requeue" in c for c in run.calls())
    assert "cancelled or preempted as a whole" in said
    assert run.left() == []


def test_it_is_not_queued_for_ever(started: Callable[..., Run]) -> None:
    run = started(ENDS="75", SLURM_RESTART_COUNT="2")
    code, said = run.end()
    assert code == 75
    assert "interrupted 2 times: not queued again" in said
    assert not any("requeue" in c for c in run.calls())


def test_a_requeue_that_is_refused_is_told(started: Callable[..., Run]) -> None:
    run = started(ENDS="75", SLURM_RESTART_COUNT="1", REQUEUE_CODE="1")
    code, said = run.end()
    assert code == 75
    assert "Slurm does not queue this job again (see above). To go on: sbatch the same file" in said


def test_a_head_that_does_not_come_up(tmp_path: Path, started: Callable[..., Run]) -> None:
    run = started(ENDS="0", RAY_DEAD="1")
    code, said = run.end()
    assert code == 3
    assert "Ray's head on node1 did not come up within 300 s; nothing was started" in said
    assert f"The end of {tmp_path}/demo-1-4711-0-ray-head.log:\ncannot bind the port" in said
    assert not any(c.startswith("rlkd") for c in run.calls())


def test_a_head_that_is_never_well(tmp_path: Path, started: Callable[..., Run]) -> None:
    text = script(tmp_path).replace("ray health-check", "false")
    run = started(text, ENDS="0", RLKD_HEAD_WAIT="2")
    code, said = run.end()
    assert code == 3
    assert "did not come up within 2 s" in said
    assert run.left() == []


def test_the_run_starts_when_all_nodes_are_there(started: Callable[..., Run]) -> None:
    run = started(ENDS="0")
    run.end()
    calls = run.calls()
    (rlkd,) = [i for i, call in enumerate(calls) if call.startswith("rlkd")]
    assert sum(call.startswith("ray start") for call in calls[:rlkd]) == 3


def test_nodes_that_do_not_join_are_told(started: Callable[..., Run]) -> None:
    run = started(ENDS="0", RAY_SLOW="1", RLKD_NODES_WAIT="-300")
    code, said = run.end()
    assert code == 0
    assert "warning: 1 of 3 Ray nodes are there, and the run starts" in said


def test_one_node_has_no_other_steps(tmp_path: Path, started: Callable[..., Run]) -> None:
    run = started(script(tmp_path, nodes=1, stable=0), ENDS="0", RAYS="1")
    assert run.end()[0] == 0
    (ray,) = [c for c in run.calls() if c.startswith("ray start")]
    assert "stable" not in ray


def test_a_folder_that_is_not_there(tmp_path: Path, started: Callable[..., Run]) -> None:
    text = script(tmp_path).replace(f"cd {tmp_path}", "cd /nowhere")
    assert started(text, ENDS="0").end()[0] == 3
