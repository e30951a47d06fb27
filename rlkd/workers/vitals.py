"""What a worker says of itself: where it is, how far it has come, how much memory its machine has left."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from rlkd.core.peak import peak_bytes

_CGROUPS = (  # the process's own limit, where a container sets one: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
NEARLY_FULL = 0.95  # of the memory: a process that dies now was most likely killed for memory


@dataclass(frozen=True)
class Place:
    """Where an actor lives."""

    pid: int
    node: str  # Ray's id of it; "" outside Ray
    host: str


@dataclass(frozen=True)
class Memory:
    """Bytes: of this process, in use on the machine (or in the container), and how many there are; and the most that
    this process ever held."""

    own: int
    used: int
    limit: int
    peak: int = 0

    @property
    def nearly_full(self) -> bool:
        return self.used >= NEARLY_FULL * self.limit

    def __str__(self) -> str:
        own, used, limit = (f"{n / 2**30:.1f}" for n in (self.own, self.used, self.limit))
        return f"{own} GiB of its own, {used} of {limit} GiB in use"


@dataclass(frozen=True)
class Vitals:
    """A sign of life."""

    version: int
    digest: str
    busy: int  # samples and sequences under way
    tokens: int  # written and scored since the start: what must grow while anything is under way
    memory: Memory


def here() -> Place:
    """This process's place."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return Place(os.getpid(), node, socket.gethostname())


def memory() -> Memory:
    """As it is now."""
    machine = psutil.virtual_memory()
    used, limit = machine.total - machine.available, machine.total
    for limit_path, used_path in _CGROUPS:
        most, now = _number(limit_path), _number(used_path)
        if most is not None and now is not None and most < limit:
            used, limit = now, most
    return Memory(psutil.Process().memory_info().rss, used, limit, peak_bytes())


def kernel_kills() -> int | None:
    """Processes the kernel has killed for memory on this machine since it started; None if it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit
