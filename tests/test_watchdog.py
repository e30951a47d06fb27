"""Who notices that nothing moves any more, what it writes down, and what it does. Without Ray."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlkd.core.errors import INFRASTRUCTURE, InfrastructureError
from rlkd.train.stages import Stages
from rlkd.workers import stacks
from rlkd.workers.roster import Roster
from rlkd.workers.vitals import Place

HANG = """
import sys, threading, time
sys.path[:0] = {path!r}
from rlkd.workers import stacks
if {listens}: stacks.listen()
def stuck_here():
    print("ready", flush=True)
    time.sleep(600)
threading.Thread(target=time.sleep, args=(600,), name="Other", daemon=True).start()
stuck_here()
"""


def child(listens: bool) -> "subprocess.Popen[str]":
    code = HANG.format(path=[str(Path(__file__).parents[1])], listens=listens)
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    assert made.stdout.readline() == "ready\n"
    return made


@pytest.fixture
def stuck() -> Iterator["subprocess.Popen[str]"]:
    made = child(listens=True)
    yield made
    made.kill()
    made.wait()


@pytest.fixture
def no_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that may not trace."""
    monkeypatch.setattr(stacks, "_by_py_spy", lambda _: (None, "py-spy: Permission Denied"))


# --- stacks


@pytest.mark.faults("F20")
@pytest.mark.parametrize("stopped", [False, True])
def test_py_spy_says_what_a_process_does_even_a_stopped_one(stuck: Any, stopped: bool) -> None:
    if stopped:
        stuck.send_signal(signal.SIGSTOP)
    found = stacks.dump(stuck.pid)
    if not found.how and "Permission" in found.text:
        pytest.skip("this machine lets nobody trace")
    assert found.how == "py-spy" or not stopped
    main = found.threads()["MainThread"]
    assert any(frame.startswith("stuck_here (<string>:") for frame in main[:2])
    assert "Other" in found.threads() or found.how == "faulthandler"


@pytest.mark.faults("F20")
@pytest.mark.usefixtures("no_py_spy")
def test_where_tracing_is_forbidden_the_process_writes_them_itself(stuck: Any) -> None:
    for _ in range(2):  # and can be asked again
        found = stacks.dump(stuck.pid)
        assert found.how == "faulthandler"
        assert found.top is not None
        assert found.top.startswith("stuck_here (<string>:")
    assert stuck.poll() is None


@pytest.mark.usefixtures("no_py_spy")
def test_who_does_not_listen_is_not_signalled() -> None:
    """SIGUSR2 would end it. What cannot be had is said with the reason."""
    deaf = child(listens=False)
    try:
        found = stacks.dump(deaf.pid)
        assert (found.how, found.top, found.text) == ("", None, "no stacks: py-spy: Permission Denied")
        time.sleep(0.2)
        assert deaf.poll() is None
    finally:
        deaf.kill()
        deaf.wait()


def test_the_engines_thread_is_the_one_that_matters() -> None:
    text = (
        'Thread 1 (idle): "MainThread"\n    select (selectors.py:468)\n    run (base_events.py:607)\n'
        'Thread 2 (active): "VLLMEngine"\n    matmul (linear.py:9)\n    _step (vllm.py:160)\n'
    )
    assert stacks.Dump(1, text, "py-spy").top == "matmul (linear.py:9)"
    assert stacks.Dump(1, "no stacks: because", "").top is None


# --- the watchdog


def watched(stages: Stages, counters: Any = tuple, stalled: Any = None, seconds: float = 0.45) -> list[str]:
    """What the watch tells within some time, while a wait is older than its 0.1 s."""
    told: list[str] = []

    async def test() -> None:
        with stages.stage("learn", "step 3"), pytest.raises(TimeoutError):
            await asyncio.wait_for(stages.watch(0.1, told.append, stalled, counters), seconds)

    asyncio.run(test())
    return told


@pytest.mark.faults("F20")
def test_when_nothing_moves_it_is_called_once() -> None:
    calls: list[str] = []

    async def stalled(text: str) -> None:
        calls.append(text)

    told = watched(Stages(), stalled=stalled)
    assert calls == ["learn step 3: 0 s"]
    assert len(told) >= 2
    assert told[0] == "still waiting (1): learn step 3: 0 s"


def test_what_moves_is_not_called_stalled_but_long_waits_are_told() -> None:
    """Neither while tokens are written, nor while other stages come and go."""
    calls: list[str] = []
    count = iter(range(1000))

    async def stalled(text: str) -> None:
        calls.append(text)

    assert watched(Stages(), lambda: (("rollout-0", next(count)),), stalled)
    stages = Stages()

    async def busy() -> None:
        while True:
            with stages.stage("verify"):
                await asyncio.sleep(0.02)

    async def test() -> None:
        others = asyncio.create_task(busy())
        with stages.stage("learn"), pytest.raises(TimeoutError):
            await asyncio.wait_for(stages.watch(0.5, lambda _: None, stalled), 1.3)
        others.cancel()

    asyncio.run(test())
    assert calls == []


# --- the roster


def rows(pid: int, **more: Any) -> dict[str, dict[str, Any]]:
    return {"rollout-0": {"pid": pid, "host": "h", "node": "", "state": "is ready", "tokens": 7, **more}}


def test_the_file_says_who_is_where_and_what_is_awaited(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "attempts" / "0001")
    roster.add(lambda: rows(41))

    async def test() -> None:
        roster.late = lambda: [("learn step 3", 12.0)]
        keeping = asyncio.create_task(roster.keep(every_s=0.01))
        await asyncio.sleep(0.1)
        keeping.cancel()

    asyncio.run(test())
    record = json.loads((tmp_path / "attempts" / "0001" / "pids.json").read_text())
    assert record["actors"]["driver"]["pid"] == os.getpid()
    assert record["actors"]["rollout-0"]["pid"] == 41
    assert record["waiting"] == [["learn step 3", 12.0]]
    assert dict(roster.counters()) == {"driver": None, "rollout-0": 7}
    assert sorted(p.name for p in (tmp_path / "attempts" / "0001").iterdir()) == ["pids.json"]


def test_a_disk_that_takes_nothing_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("a file where the folder should be")
    told: list[str] = []
    roster = Roster(tmp_path / "attempts" / "0001", tell=lambda _, text: told.append(text))

    async def test() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(roster.keep(every_s=0.01), 0.1)

    asyncio.run(test())
    assert len(told) == 1


@pytest.mark.faults("F20")
@pytest.mark.parametrize("on_stall", ["warn", "abort"])
def test_a_stall_leaves_everybodys_stacks_and_warns_or_ends_the_run(tmp_path: Path, stuck: Any, on_stall: Any) -> None:
    told: list[str] = []
    roster = Roster(tmp_path, on_stall, lambda kind, text: told.append(f"[{kind}] {text}"))
    roster.add(lambda: rows(stuck.pid))
    if on_stall == "abort":
        with pytest.raises(InfrastructureError, match=r"RLKD-I005.*awaited: learn step 3: 130 s") as caught:
            asyncio.run(roster.stalled("learn step 3: 130 s"))
        assert caught.value.exit_code == INFRASTRUCTURE
    else:
        asyncio.run(roster.stalled("learn step 3: 130 s"))
    files = sorted(p.name.split("-", 1)[1] for p in (tmp_path / "stacks").iterdir())
    assert files == sorted([f"driver-{os.getpid()}.txt", f"rollout-0-{stuck.pid}.txt"])
    assert "[stalled] nothing moves any more; awaited: learn step 3" in told[0]
    assert f"rollout-0-{stuck.pid}.txt, at stuck_here (<string>:" in told[0]


def test_a_process_that_is_gone_has_no_stacks_and_that_is_said(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert "stacks in" in asyncio.run(Roster(tmp_path).stacks("rollout-3", Place(gone.pid, "", "h")))
    [path] = (tmp_path / "stacks").iterdir()
    assert "gone, by nobody" in path.read_text()
    assert "no stacks" in path.read_text()
