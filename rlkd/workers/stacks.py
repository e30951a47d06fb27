"""What a process is doing right now: its Python stacks, from outside.

py-spy reads them from any process of this user, also from one that is stopped or hangs in C. Where it may not (a
container without the right to trace), the process is asked to write them itself: every actor and the driver `listen`
for SIGUSR2 and answer into a file in memory. A stopped process answers nobody.
"""

import asyncio
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MEMORY_FILE = "rlkd-stacks"
TIMEOUT_S = 10.0  # of py-spy
ANSWER_S = 2.0  # of a process that is asked
_listening: int | None = None


@dataclass(frozen=True)
class Dump:
    """The stacks of one process, and how they were taken; or why not."""

    pid: int
    text: str
    how: str  # "py-spy", "faulthandler", or "" without any

    @property
    def top(self) -> str | None:
        """The innermost frame of the thread that does the work: the engine's if there is one, else the main thread.
        None without stacks."""
        threads = self.threads()
        working = [frames for name, frames in threads.items() if name.endswith("Engine")]
        main = [frames for name, frames in threads.items() if name == "MainThread"]
        found = next((frames for frames in (*working, *main, *threads.values()) if frames), None)
        return _short(found[0]) if found else None

    def threads(self) -> dict[str, list[str]]:
        """Frames of each thread, innermost first, by the thread's name."""
        found: dict[str, list[str]] = {}
        frames: list[str] = []
        for line in self.text.splitlines():
            if line.startswith(("Thread ", "Current thread ")):
                name = line.split('"')[1] if '"' in line else f"thread {len(found)}"
                if self.how == "faulthandler" and name.startswith("thread"):
                    name = "MainThread" if line.startswith("Current") else name
                frames = found.setdefault(name, [])
            elif line.startswith("  ") and line.strip():
                frames.append(_readable(line.strip()))
        return found


def _short(frame: str) -> str:
    """`f (…/rlkd/engines/hf.py:3)` with the last folder and the file only."""
    function, bracket, place = frame.partition(" (")
    return f"{function} ({'/'.join(place.split('/')[-2:])}" if bracket else frame


def _readable(frame: str) -> str:
    """faulthandler's `File "a.py", line 3 in f` as py-spy's `f (a.py:3)`."""
    if not frame.startswith("File "):
        return frame
    place, _, function = frame.removeprefix("File ").partition(" in ")
    file, _, line = place.partition(", line ")
    return f"{function} ({file.strip(chr(34))}:{line})"


def listen() -> None:
    """Write this process's stacks into a file in memory at every SIGUSR2 (not where the system has no such files)."""
    global _listening
    if _listening is None and hasattr(os, "memfd_create"):
        _listening = os.memfd_create(MEMORY_FILE)
        faulthandler.register(signal.SIGUSR2, file=_listening, all_threads=True, chain=False)


def dump(pid: int) -> Dump:
    """The stacks of a process of this machine."""
    text, why = _by_py_spy(pid)
    if text is not None:
        return Dump(pid, text, "py-spy")
    text = _by_signal(pid)
    if text is not None:
        return Dump(pid, text, "faulthandler")
    return Dump(pid, f"no stacks: {why}", "")


def _by_py_spy(pid: int) -> tuple[str | None, str]:
    program = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        return None, "py-spy is not installed"
    command = [program, "dump", "--nonblocking", "--full-filenames", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"py-spy took longer than {TIMEOUT_S:g} s"
    if done.returncode or "Thread " not in done.stdout:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return None, f"py-spy: {said[0]}"
    return done.stdout, ""


def _by_signal(pid: int) -> str | None:
    """None if the process does not listen (the signal would end it), or does not answer in time."""
    try:
        links = [Path(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        files = [link for link in links if MEMORY_FILE in os.readlink(link)]
        if not files:
            return None
        before = files[0].stat().st_size
        os.kill(pid, signal.SIGUSR2)
        deadline, size = time.monotonic() + ANSWER_S, -1
        while time.monotonic() < deadline:
            now = files[0].stat().st_size
            if now > before and now == size:  # and no longer growing
                return files[0].read_bytes()[before:].decode("utf-8", "replace")
            size = now
            time.sleep(0.05)
    except OSError:
        return None
    return None


def state(pid: int) -> str | None:
    """What the system says of a process: "stopped", "sleeping", "zombie", …; None if there is none."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return None


def write(directory: Path, name: str, pid: int) -> tuple[Path, Dump]:
    """Take a process's stacks and write them into `directory`/<time>-<name>-<pid>.txt. OSError if that cannot be."""
    found = dump(pid)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}-{pid}.txt"
    path.write_text(f"{name}, pid {pid}, {state(pid) or 'gone'}, by {found.how or 'nobody'}\n\n{found.text}\n")
    return path, found


async def write_anywhere(directory: Path, name: str, place: Any) -> str:
    """As `write`, of an actor on any node of the cluster (a Place); in words."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized() or place.node in ("", ray.get_runtime_context().get_node_id()):
        path, found = await asyncio.to_thread(write, directory, name, place.pid)
    else:
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        ref = ray.remote(dump).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(place.pid)
        found = await ref
        path = directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}-{place.pid}.txt"
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}, pid {place.pid} on {place.host}\n\n{found.text}\n")
    return f"stacks in {path}" + (f", at {found.top}" if found.top else "")
