"""A Ray cluster of its own with a dashboard, for the Jobs API: ended by its process, never by `ray stop`."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 120.0
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = uuid.uuid4().hex  # the cluster asks for it, as Ray's do by default where there is one


@dataclass(frozen=True)
class Head:
    address: str  # of the dashboard
    folder: Path  # Ray's
    dashboard: int  # the port
    gcs: str  # for ray.address


def environment(**more: str) -> dict[str, str]:
    """As that of somebody who works in the virtual environment of these tests, with this checkout."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{BIN}{os.pathsep}{ours['PATH']}"
    return {**ours, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": TOKEN, **more}


def free_ports(count: int) -> list[int]:
    """None that the system gives out by itself (32768 and up), for another cluster may take it before Ray binds it
    here; nor one of Ray's workers (10002 to 19999)."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            found.add(port)
    return list(found)


@contextmanager
def head(cpus: int = 4, more: Sequence[str] = ()) -> Iterator[Head]:
    """The cluster, until the context ends. `more`: options of its `ray start --head`."""
    folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # Ray's sockets need a short path
    dashboard, agent, grpc, metrics, client, gcs = free_ports(6)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--num-cpus={cpus}", f"--temp-dir={folder}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", "--object-store-memory=200000000",
        "--disable-usage-stats", *more,
    ]  # fmt: skip
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(RAY_AUTH_MODE="token"), cwd="/")
    try:
        _up(process, dashboard, folder)
        yield Head(f"http://127.0.0.1:{dashboard}", folder, dashboard, f"127.0.0.1:{gcs}")
    finally:
        end(process.pid)
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def end(pid: int) -> None:
    """The process and all that it started."""
    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def processes(*words: str) -> list[psutil.Process]:
    """Those whose command line has all of these words."""
    every = psutil.process_iter(["cmdline"])
    return [p for p in every if all(word in " ".join(p.info["cmdline"] or ()) for word in words)]


def _up(process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
    until = time.monotonic() + START_S
    ask = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(ask, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"Ray did not come up:\n{(folder / 'start.log').read_text()[-3000:]}")
