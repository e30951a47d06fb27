"""Trackers that are slow, down, refuse or hang: the run never waits for them, and says what they did not take."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlkd.report.isolated import Isolated, Say, Sink
from rlkd.report.sinks import TensorBoard, Wandb
from tests.report_help import feed, report


class Tracker:
    """Takes rows; can be told to fail or to hang."""

    def __init__(self, fail: str = "", hang: str = "") -> None:
        self.fail, self.hang = fail, hang
        self.rows: list[int] = []
        self.released = threading.Event()
        self.reached = threading.Event()
        self.killed = False

    def at(self, place: str) -> None:
        if place == self.hang:
            self.reached.set()
            self.released.wait(30)
        if place == self.fail:
            raise ConnectionError(f"{place} is down\nand more")

    def open(self, say: Say) -> None:
        self.at("open")
        say("hello")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.at("write")
        self.rows.append(step)

    def close(self) -> None:
        self.at("close")

    def kill(self) -> None:
        self.killed = True
        self.released.set()


def fed(tracker: Sink, rows: int = 5, room: int = 1000, wait_s: float = 10.0) -> tuple[Isolated, list[str]]:
    said: list[str] = []
    sink = Isolated("tracker", tracker, said.append, room)
    for step in range(rows):
        sink.write(step, {"reward": 1.0})
    sink.close(wait_s)
    return sink, said


def test_rows_arrive_in_order_and_all() -> None:
    tracker = Tracker()
    sink, said = fed(tracker, 500)
    assert tracker.rows == list(range(500))
    assert (sink.dropped, said, tracker.killed) == (0, ["tracker: hello"], False)


@pytest.mark.parametrize("place", ["open", "write"])
def test_errors_are_told_once_and_rows_counted(place: str) -> None:
    sink, said = fed(Tracker(fail=place))
    assert sink.dropped == 5
    assert sum("ConnectionError" in text for text in said) == 1
    assert not any("and more" in text for text in said)
    assert said[-1] == "tracker did not take 5 rows; metrics.jsonl has every row"


def test_an_outage_that_ends_is_told_again_when_it_comes_back() -> None:
    tracker = Tracker()
    said: list[str] = []
    sink = Isolated("tracker", tracker, said.append)
    for step, failing in enumerate(["", "write", "write", "", "write"]):
        tracker.fail = failing
        sink.write(step, {})
        while sink.dropped + len(tracker.rows) <= step:  # until the row is through, one way or the other
            time.sleep(0.001)
    sink.close()
    assert tracker.rows == [0, 3]
    assert [text.split(":")[0] for text in said[1:]] == [
        "tracker did not take step 1",
        "tracker did not take step 4",
        "tracker did not take 3 rows; metrics.jsonl has every row",
    ]


def test_an_error_at_the_end_is_told() -> None:
    _, said = fed(Tracker(fail="close"))
    assert said[-1] == "tracker did not close: ConnectionError: close is down"


@pytest.mark.faults("F59")
@pytest.mark.parametrize("place", ["open", "write", "close"])
def test_a_tracker_that_hangs_is_left(place: str) -> None:
    tracker = Tracker(hang=place)
    sink, said = fed(tracker, wait_s=0.2)
    assert tracker.killed
    assert sum("did not finish within 0.2 s" in text for text in said) == 1
    assert sink.dropped == {"open": 5, "write": 4, "close": 0}[place]  # the row under way may still arrive


@pytest.mark.faults("F59")
def test_the_oldest_rows_go_when_the_queue_is_full() -> None:
    tracker = Tracker(hang="write")
    said: list[str] = []
    sink = Isolated("tracker", tracker, said.append, room=10)
    sink.write(0, {})
    assert tracker.reached.wait(10)
    for step in range(1, 100):
        sink.write(step, {})  # returns although the tracker hangs
    assert sink.dropped == 89
    tracker.released.set()
    sink.close()
    assert tracker.rows == [0, *range(90, 100)]
    assert said[-1] == "tracker did not take 89 rows; metrics.jsonl has every row"


def test_telling_happens_in_the_callers_thread() -> None:
    threads: list[threading.Thread] = []
    sink = Isolated("tracker", Tracker(fail="write"), lambda _: threads.append(threading.current_thread()))
    sink.write(0, {})
    sink.close()
    assert set(threads) == {threading.current_thread()}


@pytest.mark.faults("F59")
def test_a_run_does_not_notice_a_broken_tracker(tmp_path: Path) -> None:
    r = report(tmp_path)
    tell = lambda text: r.event("tracker", text)  # noqa: E731
    good, bad, late = Tracker(), Tracker(fail="open"), Tracker(fail="close")
    r.sinks = [Isolated("bad", bad, tell), Isolated("good", good, tell), Isolated("late", late, tell)]
    for step in (1, 2, 3):
        feed(r, step)
    r.close()
    assert good.rows == [1, 2, 3]
    events = (tmp_path / "events.jsonl").read_text()
    assert "bad is off for this run" in events
    assert "late did not close" in events


# ── TensorBoard ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, steps in enumerate(((1, 2, 3, 4), (3, 4))):
        sink = Isolated("TensorBoard", TensorBoard(tmp_path), print)
        for step in steps:
            sink.write(step, {"reward/mean": step + 10.0 * attempt})
        sink.close()
        assert sink.dropped == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1), (2, 2), (3, 13), (4, 14)]


# ── Weights & Biases ─────────────────────────────────────────────────────────────────────────────────────────────────

FAKE = """
import json, os, sys, time
from pathlib import Path

how = os.environ["FAKE_WANDB"].split()
print("wandb prints much")  # to stdout, among the messages

def at(place):
    if "hang-" + place in how:
        time.sleep(60)
    if "raise-" + place in how:
        raise RuntimeError(place + " does not work")
    if "crash-" + place in how:
        os._exit(3)

at("import")

class Settings(dict):
    def __init__(self, **k):
        super().__init__(**k)

class Run:
    def __init__(self, k):
        self.file = Path(k["dir"], "fake.jsonl").open("a")
        self.put({"init": {n: v for n, v in k.items() if n != "settings"}})
    def put(self, row):
        self.file.write(json.dumps(row) + "\\n")
        self.file.flush()
    def define_metric(self, *a, **k): pass
    def log(self, row):
        at("log")
        self.put(row)
    def finish(self):
        at("finish")
        self.put({"finish": True})

def init(**k):
    at("init-" + k["mode"])
    return Run(k)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path


def tracked(
    directory: Path, how: str, monkeypatch: pytest.MonkeyPatch, mode: str = "offline", start_s: float = 20.0
) -> tuple[Isolated, list[str], list[dict]]:  # type: ignore[type-arg]
    """Three rows through a wandb that does as told: the sink, what was said, what wandb got."""
    monkeypatch.setenv("FAKE_WANDB", how)
    said: list[str] = []
    wandb = Wandb(directory, "project", "name", mode, {"seed": 1}, start_s=start_s, finish_s=0.5)
    sink = Isolated("wandb", wandb, said.append)
    for step in range(3):
        sink.write(step, {"reward": float(step)})
    sink.close(20.0)
    assert wandb.process is not None
    wandb.process.wait(5.0)  # TimeoutExpired if wandb's process was left behind
    got = directory / "fake.jsonl"
    return sink, said, [json.loads(line) for line in got.read_text().splitlines()] if got.exists() else []


def test_wandb_gets_every_row_and_the_config_it_is_given(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, said, got = tracked(fake, "", monkeypatch)
    assert (sink.dropped, said) == (0, [])
    init = got[0]["init"]
    assert (init["project"], init["name"], init["mode"], init["config"]) == ("project", "name", "offline", {"seed": 1})
    assert got[1:] == [*({"reward": float(s), "step": s} for s in range(3)), {"finish": True}]
    tracked(fake, "", monkeypatch)
    again = [json.loads(line) for line in (fake / "fake.jsonl").read_text().splitlines()]
    assert {row["init"]["id"] for row in again if "init" in row} == {init["id"]}  # one run, however many attempts


@pytest.mark.faults("F59")
def test_wandb_without_a_login_is_kept_offline(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, said, got = tracked(fake, "raise-init-online", monkeypatch, mode="online")
    assert sink.dropped == 0
    assert len(said) == 1
    assert said[0].startswith("wandb: online does not work (RuntimeError: init-online does not work); kept offline")
    assert got[0]["init"]["mode"] == "offline"
    assert len(got) == 5


@pytest.mark.parametrize("how", ["raise-import", "raise-init-offline", "crash-import", "crash-init-offline"])
def test_wandb_that_does_not_start_is_a_warning(fake: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    sink, said, _ = tracked(fake, how, monkeypatch)
    assert sink.dropped == 3
    assert said[0].startswith("wandb is off for this run: RuntimeError: ")


def test_wandb_that_hangs_at_the_start_is_ended(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, said, _ = tracked(fake, "hang-init-offline", monkeypatch, start_s=1.0)
    assert sink.dropped == 3
    assert "TimeoutError: waiting for its “ready” took too long" in said[0]


def test_wandb_that_refuses_rows_is_told_and_counted(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said, got = tracked(fake, "raise-log", monkeypatch)
    assert said == [
        "wandb: a row was refused: RuntimeError: log does not work",
        "wandb: 3 rows were refused",
    ]
    assert len(got) == 2


@pytest.mark.faults("F59")
def test_wandb_that_crashes_is_told(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said, _ = tracked(fake, "crash-log", monkeypatch)
    assert any("its process" in text or "BrokenPipe" in text for text in said)


@pytest.mark.stack
@pytest.mark.parametrize("how", ["hang-finish", "hang-log"])
def test_wandb_that_hangs_later_is_ended(fake: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    _, said, got = tracked(fake, how, monkeypatch)
    assert len(got) == {"hang-finish": 4, "hang-log": 1}[how]
    assert said


def test_wandb_does_not_outlive_a_killed_run(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed with SIGKILL while wandb would hang in finish: it is gone soon after."""
    monkeypatch.setenv("FAKE_WANDB", "hang-finish")
    program = f"""
import time
from pathlib import Path
from rlkd.report.sinks import Wandb
w = Wandb(Path({str(fake)!r}), "p", "n", "offline", {{}}, finish_s=0.5)
w.open(print)
print(w.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        assert os.getpgid(child) == child  # a group of its own: Ctrl-C is not for wandb
        run.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("wandb's process outlived the run by 10 s")


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("recipe", "environment", "mode"),
    [("online", "offline", "offline"), ("offline", "online", "offline"), ("online", "disabled", "disabled")],
)
def test_the_environment_can_only_make_wandb_stricter(
    fake: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, environment: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    _, _, got = tracked(fake, "", monkeypatch, mode=recipe)
    assert got[0]["init"]["mode"] == mode


@pytest.mark.stack
def test_real_wandb_offline_without_account_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "hf_TESTSECRET1234567890"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    sink = Isolated("wandb", Wandb(tmp_path, "rlkd", "test", "online", {"seed": 1}), said.append)
    r = report(tmp_path, sinks=[sink])
    for step in (1, 2, 3):
        feed(r, step)
    r.close()
    assert (sink.dropped, said) == (0, [])
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    (written,) = [p for p in files if p.suffix == ".wandb"]
    assert b"reward/mean" in written.read_bytes()
    assert not [p for p in files if canary.encode() in p.read_bytes()]
