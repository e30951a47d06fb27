"""Nodes with addresses of their own: each a network namespace behind a bridge, with its own /dev/shm, /tmp/own and
raylet. Needs root (or the capabilities to make namespaces); `possible` says why not."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PORT = 6399
# A node that does not answer for 5 seconds is dead.
DETECT = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "1000",
          "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "5"}  # fmt: skip
BIN = Path(sys.executable).parent


def possible() -> str | None:
    """Why there can be no namespaces here; None: there can."""
    if shutil.which("ip") is None:
        return "the command `ip` is not installed"
    name = f"rlkd-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30, check=False)
    if made.returncode:
        return f"`ip netns add`: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], timeout=30, check=False)
    return None


@dataclass
class Network:
    """A bridge with machines on it."""

    number: int  # 10.NUMBER.0.0/24; part of every name
    machines: list[str] = field(default_factory=list)  # names of namespaces
    raylets: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def address(self, machine: str) -> str:
        return f"10.{self.number}.0.{self.machines.index(machine) + 1}"

    @property
    def head(self) -> str:
        """Ray's address."""
        return f"{self.address(self.machines[0])}:{PORT}"

    def machine(self) -> str:
        """One more, on the bridge."""
        if not self.machines:
            _do("ip link add", self._bridge, "type bridge")
            _do("ip link set", self._bridge, "up")
        name = f"rlkd{self.number}n{len(self.machines)}"
        self.machines.append(name)
        _do("ip netns add", name)
        _do("ip link add", self._plug(name), f"type veth peer name eth0 netns {name}")
        _do("ip link set", self._plug(name), "master", self._bridge, "up")
        _do(f"ip -n {name} addr add {self.address(name)}/24 dev eth0")
        _do(f"ip -n {name} link set eth0 up")
        _do(f"ip -n {name} link set lo up")
        return name

    def start(self, machine: str, log: Path, **resources: float) -> None:
        """Its raylet, in shared memory and a folder of its own."""
        if machine == self.machines[0]:
            role, own = f"--head --port={PORT} --include-dashboard=false", "/tmp/own"
        else:  # nodes that start at once in one folder take each other's sockets; a driver looks into the head's
            role, own = f"--address={self.head}", "/tmp/own /tmp/ray"
        options = ",".join(f'"{k}": {v}' for k, v in resources.items())
        command = (
            f"for at in /dev/shm {own}; do mkdir -p $at && mount -t tmpfs tmpfs $at || exit 1; done; "
            f"exec {BIN}/ray start {role} --node-ip-address={self.address(machine)} --num-cpus=1 --block "
            f"--object-store-memory={80 * 2**20} --disable-usage-stats --resources='{{{options}}}'"
        )
        environment = {**os.environ, **DETECT}
        with log.open("ab") as out:
            self.raylets[machine] = subprocess.Popen(
                [*inside(machine), "unshare", "-m", "sh", "-c", command], stdout=out, stderr=out, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def cut(self, machine: str) -> None:
        """Pull the plug: nothing comes or goes, nobody is told."""
        _do("ip link set", self._plug(machine), "down")

    def heal(self, machine: str) -> None:
        _do("ip link set", self._plug(machine), "up")

    def close(self) -> None:
        """End everything on the machines, and the machines."""
        for name in reversed(self.machines):
            for _ in range(50):
                pids = _said(f"ip netns pids {name}").split()
                for pid in pids:
                    _do(f"kill -9 {pid}", must=False)
                if not pids:
                    break
                time.sleep(0.1)
            _do(f"ip netns del {name}", must=False)
        for raylet in self.raylets.values():
            raylet.wait(30)
        _do("ip link del", self._bridge, must=False)

    @property
    def _bridge(self) -> str:
        return f"rlkdbr{self.number}"

    def _plug(self, machine: str) -> str:
        return f"{machine}v"


def inside(machine: str) -> list[str]:
    """The beginning of a command there."""
    return ["ip", "netns", "exec", machine]


@contextmanager
def network(number: int = 77) -> Iterator[Network]:
    made = Network(number)
    try:
        yield made
    finally:
        made.close()


def _do(*words: str, must: bool = True) -> None:
    done = subprocess.run(_split(words), capture_output=True, text=True, timeout=30, check=False)
    assert not must or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _said(*words: str) -> str:
    return subprocess.run(_split(words), capture_output=True, text=True, timeout=30, check=False).stdout


def _split(words: Sequence[str]) -> list[str]:
    return " ".join(words).split()
