"""`rlkd why-stuck`: one sentence about a run, from its folder and its processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlkd.core.errors import PreflightError
from rlkd.why_stuck import Actor, Snapshot, diagnosis, why_stuck
from rlkd.workers.stacks import Dump

pytestmark = pytest.mark.faults("F20")
STACK = 'Thread 1 (active): "MainThread"\n    {} (a.py:3)\n'


def actor(name: str, state: str | None = "sleeping", frame: str = "wait", **row: Any) -> Actor:
    return Actor(name, {"pid": 7, "state": "is ready", **row}, True, state, Dump(7, STACK.format(frame), "py-spy"))


def snapshot(*actors: Actor, age_s: float = 2.0, waiting: tuple[tuple[str, float], ...] = ()) -> Snapshot:
    return Snapshot(age_s, 5.0, {a.name: a for a in (actor("driver"), *actors)}, waiting)


BUSY = actor("rollout-1", frame="matmul", calls=4, tokens=900, idle_s=61.0)
IDLE = actor("rollout-0", calls=0, tokens=950, idle_s=None)
SENTENCES = [
    (
        snapshot(IDLE, BUSY, waiting=(("rollout p7", 70.0),)),
        "rollout-1 has written no token for 63 s with 4 calls under way while rollout-0 is idle; "
        "its top frame is matmul (a.py:3)",
    ),
    (
        snapshot(IDLE, actor("learner-0", "stopped")),
        "learner-0 (pid 7) is stopped by a signal: `kill -CONT 7` lets it go on",
    ),
    (snapshot(IDLE, actor("reward-0", None)), "the process of reward-0 (pid 7) is gone; the run has not noticed yet"),
    (
        snapshot(IDLE, age_s=40.0),
        "the driver has not come round its loop for 40 s; its top frame is wait (a.py:3)",
    ),
    (
        snapshot(IDLE, actor("learner-0", frame="all_reduce"), waiting=(("learn step 3", 70.0), ("rollout p1", 3.0))),
        "`learn step 3` has been awaited for 70 s; learner-0: its top frame is all_reduce (a.py:3)",
    ),
    (snapshot(IDLE, actor("rollout-1", calls=4, idle_s=3.0)), "nothing is stuck"),
]


@pytest.mark.parametrize(("now", "said"), SENTENCES, ids=[s[1][:30] for s in SENTENCES])
def test_the_sentence(now: Snapshot, said: str) -> None:
    assert diagnosis(now).startswith(said)


# --- from a folder


def run_folder(folder: Path, **record: Any) -> Path:
    """A run's folder with one attempt under way."""
    attempt = folder / "attempts" / "0001"
    attempt.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": "t", "attempts": [{"attempt": 1}]}))
    (folder / "events.jsonl").write_text('{"kind": "worker_lost", "text": "rollout-0 died", "time": "t1"}\n')
    (folder / "metrics.jsonl").write_text('{"step": 4, "time": "t0"}\n')
    made = {"time": time.time(), "every_s": 5.0, "host": socket.gethostname(), "actors": {}, "waiting": []}
    (attempt / "pids.json").write_text(json.dumps({**made, **record}))
    return folder


def of(pid: int, **more: Any) -> dict[str, Any]:
    return {"pid": pid, "host": socket.gethostname(), "node": "", "state": "is ready", **more}


@pytest.mark.faults("F20")
def test_a_stopped_worker_of_a_live_run(tmp_path: Path) -> None:
    hung = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        hung.send_signal(signal.SIGSTOP)
        os.waitpid(hung.pid, os.WUNTRACED)  # until it has stopped
        actors = {"driver": of(os.getpid()), "rollout-0": of(hung.pid, calls=3, tokens=10, idle_s=30.0)}
        run = run_folder(tmp_path, actors=actors, waiting=[["rollout p7", 44.0]])
        told = why_stuck(run)
        assert told["diagnosis"].startswith(f"rollout-0 (pid {hung.pid}) is stopped by a signal")
        assert told["actors"]["rollout-0"]["process"] == "stopped"
        assert "rollout p7: 44 s" in told["text"]
        assert "last step: 4" in told["text"]
        assert "[worker_lost] rollout-0 died" in told["text"]
        [stack] = (run / "attempts" / "0001" / "stacks").iterdir()
        assert f"rollout-0-{hung.pid}" in stack.name
    finally:
        hung.kill()
        hung.wait()


def test_a_driver_that_was_killed_left_no_word(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    told = why_stuck(run_folder(tmp_path, actors={"driver": of(dead.pid)}))
    assert "is gone, and left no word of its end: it was killed" in told["diagnosis"]
    assert "rollout-0 died" in told["text"]


def test_a_pid_that_is_somebody_elses_by_now_is_not_taken_for_ours(tmp_path: Path) -> None:
    run = run_folder(tmp_path, actors={"driver": of(os.getpid())}, time=time.time() - 1e6)
    assert "is gone" in why_stuck(run)["diagnosis"]


def test_a_run_that_is_over_says_how(tmp_path: Path) -> None:
    run = run_folder(tmp_path, actors={"driver": of(1)})
    end = {"code": 6, "cause": "rollout-0 ran out of memory twice in a row"}
    (run / "attempts" / "0001" / "exit.json").write_text(json.dumps(end))
    assert why_stuck(run)["diagnosis"] == "the run is over (exit 6): rollout-0 ran out of memory twice in a row"
    (run / "attempts" / "0001" / "exit.json").unlink()
    (run / "run.json").write_text(json.dumps({"attempts": [{"exit": 75}]}))
    assert why_stuck(run)["diagnosis"] == "the run is over (exit 75)"


def test_what_is_no_run_and_what_did_not_begin(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="no run's folder"):
        why_stuck(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"attempts": []}))
    assert "nothing is known of its processes" in why_stuck(tmp_path)["diagnosis"]


def test_actors_of_other_machines_are_named_and_left_alone(tmp_path: Path) -> None:
    far = {"pid": 1, "host": "elsewhere", "state": "is ready", "calls": 0}
    told = why_stuck(run_folder(tmp_path, actors={"driver": of(os.getpid()), "rollout-0": far}))
    assert told["diagnosis"].startswith("nothing is stuck")
    assert "rollout-0: pid 1, is ready, 0 calls, on elsewhere" in told["text"]
