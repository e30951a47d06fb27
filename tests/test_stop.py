"""One request to stop, asked from anywhere, seen everywhere."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlkd.core.errors import InfrastructureError, LearnerLost, Stopped
from rlkd.core.stop import Stop, StopRequest, seconds_until
from rlkd.ending import announced, nothing_new, saving, started, translated
from rlkd.signals import Signals, StopNow, grace_of_platform
from tests.test_cli import environment


def asked(kind: str = "signal", deadline: float | None = None) -> StopRequest:
    return StopRequest(kind, f"because of a {kind}", deadline)


def test_nobody_has_asked() -> None:
    stop = Stop()
    assert not stop.is_set()
    assert stop.request is None
    assert stop.left_s() is None


def test_the_first_request_counts_and_the_earliest_deadline_holds() -> None:
    stop = Stop(clock=lambda: 10.0)
    stop.ask(asked("signal"))
    assert stop.request == asked("signal")
    assert stop.left_s() is None
    stop.ask(asked("drain", 50.0))
    stop.ask(asked("deadline", 70.0))
    assert stop.request == StopRequest("signal", "because of a signal", 50.0)
    assert stop.left_s() == 40.0
    stop.ask(asked("deadline", 3.0))
    assert stop.left_s() == 0.0  # past: not a negative time


def test_a_kind_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="'weather'"):
        StopRequest("weather", "it rains")


def test_asked_from_another_thread_it_wakes_all_who_wait() -> None:
    stop = Stop()

    async def main() -> list[StopRequest]:
        waiting = [asyncio.create_task(stop.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        threading.Thread(target=stop.ask, args=(asked("drain"),)).start()
        return await asyncio.wait_for(asyncio.gather(*waiting), 10)

    assert asyncio.run(main()) == [asked("drain")] * 3


def test_asked_before_it_is_awaited_and_awaited_in_a_second_loop() -> None:
    stop = Stop()

    async def abandoned() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.01)

    asyncio.run(abandoned())  # its loop is closed when the request comes
    stop.ask(asked())
    assert asyncio.run(asyncio.wait_for(stop.wait(), 10)) == asked()


def test_asked_in_a_signal_handler_while_the_loop_sleeps() -> None:
    stop = Stop()
    before = signal.signal(signal.SIGUSR1, lambda *_: stop.ask(asked()))

    async def main() -> StopRequest:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        return await asyncio.wait_for(stop.wait(), 10)

    try:
        assert asyncio.run(main()) == asked()
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- when it is over


@pytest.mark.parametrize(
    ("when", "left"),
    [("3600", 3600.0), ("2.5", 2.5), ("1970-01-01T01:00:00+00:00", 3600.0), ("1970-01-01T02:00+01:00", 3600.0)],
)
def test_a_time_is_seconds_or_iso(when: str, left: float) -> None:
    assert seconds_until(when, 0.0) == left


@pytest.mark.parametrize("when", ["soon", "-3", "0", "inf", "nan", "", "25:00"])
def test_what_is_no_time(when: str) -> None:
    with pytest.raises(ValueError, match=r"isoformat|number of seconds"):
        seconds_until(when, 0.0)


# -- signals, each in a process of its own

CHILD = """
import os, sys, time, subprocess
from rlkd.core.stop import Stop
from rlkd.signals import Signals, StopNow
stop = Stop()
def last():
    print("last", flush=True)
    if sys.argv[1] == "stuck":
        time.sleep(60)
with Signals(stop, grace_s=7.0, last=last) as signals:
    if sys.argv[1] == "reading":
        try:
            with signals.interruptible():
                print("ready", flush=True)
                time.sleep(60)
        except StopNow:
            print("nothing lost", stop.request.kind, flush=True)
            sys.exit(75)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("ready", child.pid, flush=True)
    told = False
    while sys.argv[1] != "saves" or not stop.is_set():
        if stop.is_set() and not told:
            print("asked", stop.request.kind, stop.left_s() is not None, flush=True)
            told = True
        time.sleep(0.01)
    print("saved", stop.request.text, flush=True)
    sys.exit(75)
"""


class Child:
    """The program above, and what it says, line by line."""

    def __init__(self, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.words = self.hears()

    def hears(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def gets(self, number: int) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        return self.process.wait(30)


@pytest.mark.faults("F60")
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, ["saved", "Ctrl-C"]), (signal.SIGTERM, ["saved", "SIGTERM"])]
)
def test_one_signal_asks_to_save(number: int, said: list[str]) -> None:
    child = Child("saves")
    child.gets(number)
    assert child.hears() == said
    assert child.ends() == 75


@pytest.mark.faults("F60")
def test_while_nothing_can_be_lost_one_signal_ends_at_once() -> None:
    child = Child("reading")
    child.gets(signal.SIGTERM)
    assert child.hears() == ["nothing", "lost", "signal"]
    assert child.ends() == 75


@pytest.mark.faults("F60")
def test_ctrl_c_twice_ends_without_saving() -> None:
    child = Child("waits")
    child.gets(signal.SIGINT)
    assert child.hears() == ["asked", "user", "False"]
    child.gets(signal.SIGINT)
    assert child.hears() == ["last"]  # why it ended is written down
    assert child.ends() == 130
    assert child.process.stderr is not None
    os.set_blocking(child.process.stderr.fileno(), False)  # what it started still has it open
    assert "stopped without saving: the last checkpoint stands (exit 130)" in child.process.stderr.read()


@pytest.mark.faults("F60")
def test_ctrl_c_a_third_time_kills_everything() -> None:
    child = Child("stuck")
    grandchild = psutil.Process(int(child.words[1]))
    for said in ("asked", "last"):
        child.gets(signal.SIGINT)
        assert child.hears()[0] == said
    child.gets(signal.SIGINT)
    assert child.ends() == -signal.SIGKILL
    grandchild.wait(10)


@pytest.mark.faults("F60")
def test_sigterm_may_come_again_and_has_a_deadline() -> None:
    child = Child("waits")
    child.gets(signal.SIGTERM)
    assert child.hears() == ["asked", "signal", "True"]
    for _ in range(3):
        child.gets(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(0.5)
    child.gets(signal.SIGINT)  # the user does not want to wait for the save
    assert child.ends() == 130


def test_a_handler_that_somebody_replaced_is_taken_back() -> None:
    """As ray.init replaces it (M8)."""
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    with Signals(stop) as signals:
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not ours"))
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.request == StopRequest("signal", "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


def test_rays_own_handler_does_not_abort_the_save() -> None:
    """Before it calls ours it sets an alarm, of which the process dies 3 s later."""
    signal.alarm(100)
    with Signals(Stop()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert signal.alarm(0) == 0


def test_in_another_thread_it_does_nothing() -> None:
    before, done = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with Signals(Stop()) as signals:
            signals.install()
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [before]


@pytest.mark.parametrize(
    ("configured", "told", "grace"), [(None, None, None), (None, "20", 20.0), (9.0, "20", 9.0), (None, "soon", None)]
)
def test_the_platforms_grace(
    monkeypatch: pytest.MonkeyPatch, configured: float | None, told: str | None, grace: float | None
) -> None:
    if told is None:
        monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    else:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", told)
    assert grace_of_platform(configured) == grace


# -- a start that is broken off, and what is said


def run_started(starting: Any, stop: Stop) -> Any:
    with Signals(stop) as signals:
        return asyncio.run(started(starting, stop, signals))


def test_what_has_started_is_handed_on() -> None:
    async def start() -> str:
        return "fleet"

    assert run_started(start(), Stop()) == "fleet"


@pytest.mark.faults("F60", "F11")
def test_a_request_breaks_off_the_start() -> None:
    stop, ended = Stop(), []

    async def start() -> None:
        try:
            asyncio.get_running_loop().call_later(0.05, stop.ask, asked("drain"))
            await asyncio.sleep(60)
        finally:
            ended.append("what was started")

    with pytest.raises(StopNow):
        run_started(start(), stop)
    assert ended == ["what was started"]


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (StopNow(), Stopped, "because of a drain: nothing to save; the same command starts again"),
        (SystemExit(signal.SIGTERM), Stopped, "because of a drain: nothing to save"),
        (SystemExit(3), SystemExit, "3"),
        (LearnerLost("rank 1 died"), InfrastructureError, "the run lost rank 1 died"),
        (ZeroDivisionError("oh"), ZeroDivisionError, "oh"),
    ],
)
def test_what_ends_a_run_is_a_known_error(
    tmp_path: Path, error: BaseException, expected: type[BaseException], said: str
) -> None:
    stop = Stop()
    stop.ask(asked("drain"))
    with pytest.raises(expected, match=said) as caught, translated(tmp_path, stop):
        raise error
    if isinstance(caught.value, Stopped):
        assert caught.value.exit_code == 75


def test_the_checkpoint_that_stands_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000040").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000040" / "MANIFEST.json").touch()
    text = nothing_new(tmp_path, Stop())
    assert text == "stopped: nothing new to save, the checkpoint of step 40 stands; the same command goes on there"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("user", "saving step 7 (about 4 s); press Ctrl-C again to"),
        ("drain", "saving step 7 (about 4 s); press Ctrl-C to"),
    ],
)
def test_a_request_is_announced_with_what_it_will_take(kind: str, said: str) -> None:
    stop, told = Stop(), []

    async def main() -> None:
        async with announced(stop, lambda: saving(7, 4.2), lambda *what: told.append(what)):
            stop.ask(asked(kind))
            await asyncio.sleep(0.05)

    asyncio.run(main())
    assert told == [("stopping", f"because of a {kind}: {said} stop without saving")]
    assert saving(None, None) == saving(0, 3.0) == "nothing is trained yet"
