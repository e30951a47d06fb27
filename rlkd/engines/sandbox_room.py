"""The way of a process into the sandbox: fork, namespaces, an empty root, no rights, no names, then a fresh Python.

    judge's child ─ fork ─► A ─ unshare, fork ─► B: process 1 of its own PID namespace ─ exec ─► python

Nothing of the judge's memory goes in (exec), nothing of its environment, no descriptor but the channel. B's root is an
empty tmpfs in which the interpreter and the system's libraries are mounted read-only, and /box, which is small, private
and not executable; there is no /proc, no /sys, no home. Landlock says the same once more, seccomp takes away the calls
that could undo it. When A or the judge's child dies, the kernel kills B, and with it the whole namespace.

As root, B becomes nobody (65534) before any of the answer runs; otherwise it is the user, with no rights over others.
"""

import os
import resource
import signal
import stat
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rlkd.engines import sandbox_filter as seccomp
from rlkd.engines import sandbox_kernel as kernel

CHANNEL = 3  # the descriptor that process 1 talks on
NOBODY = 65534
PROCESSES = 32  # at once, threads counted; holds per user namespace since Linux 5.14
FILES = 64  # open descriptors of a process
_OLD = "/.old"
_PROBLEMS = 300  # a descriptor out of the way of those in use
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_NAMESPACES = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
)  # fmt: skip


@dataclass(frozen=True)
class Room:
    """What a sandboxed process may use."""

    closed: bool = True  # namespaces, Landlock, seccomp; False: only a process of its own, with limits (tier `process`)
    memory: int = 1 << 30  # bytes of address space of each process
    seconds: int = 60  # of CPU time of each process
    file_bytes: int = 16 << 20  # of one file
    disk_bytes: int = 64 << 20  # of the private /tmp
    packages: bool = False  # site-packages too, not only the standard library
    home: str = "/box"  # the private directory, also called /tmp; with closed=False one that the caller made

    @property
    def site(self) -> list[str]:
        """Where Python finds installed packages; none unless asked for."""
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if self.packages else set()
        return sorted(os.path.realpath(p) for p in paths)


def enter(room: Room, source: str, channel: int, problems: int, ready: int, go: int) -> int:
    """Forks A, which goes all the way. Returns A's pid at once.

    A writes b"u" to `ready` when its namespaces are made and waits for b"m" on `go`, so that the caller can map its
    users (`map_users`, as root); then B's pid, 4 bytes, little endian. What goes wrong is written to `problems` as
    text: end of file there with nothing written means that Python runs.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        for descriptor in (channel, problems, ready, go):
            os.set_inheritable(descriptor, False)
        _apart(room, source, channel, problems, ready, go)
    except BaseException as e:
        os.write(problems, f"{type(e).__name__}: {e}".encode("utf-8", "backslashreplace")[:1000])
    finally:
        os._exit(1)


def map_users(pid: int) -> None:
    """As root: `pid`, which has just made its user namespace, is root and nobody there. OSError."""
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")


def _apart(room: Room, source: str, channel: int, problems: int, ready: int, go: int) -> None:
    """A: makes the namespaces, forks B into them, waits for its end."""
    kernel.die_with_parent(signal.SIGKILL)
    if room.closed:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(_NAMESPACES)
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1\n")
            Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1\n")
    os.write(ready, b"u")
    if os.read(go, 1) != b"m":
        os._exit(1)  # the caller went away
    pid = os.fork()
    if pid == 0:
        _inside(room, source, channel, problems)
    os.write(ready, pid.to_bytes(4, "little"))
    os.closerange(0, 1 << 16)
    _, status = os.waitpid(pid, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _inside(room: Room, source: str, channel: int, problems: int) -> NoReturn:
    """B: builds its root, gives up everything, becomes Python."""
    try:
        python = os.path.realpath(sys.executable)
        os.setsid()
        _descriptors(channel, problems)
        if room.closed:
            places = _furnish(room, python)
            _give_up()
        kernel.die_with_parent(signal.SIGKILL)
        os.chdir(room.home)
        _limit(room)
        kernel.no_new_privileges()
        if room.closed:
            kernel.landlock([p for p in places if p not in _DEVICES], [p for p in places if p in _DEVICES], [room.home])
            seccomp.install(kernel.machine())
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": room.home}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        os.execve(python, [python, "-I", "-S", "-B", "-X", "utf8", "-c", source], environment)
    except BaseException as e:
        os.write(_PROBLEMS, f"{type(e).__name__}: {e}".encode("utf-8", "backslashreplace")[:1000])
    finally:
        os._exit(1)


def _give_up() -> None:
    """No capability, and as root no longer root."""
    kernel.drop_bounding_set()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.drop_capabilities()


def _furnish(room: Room, python: str) -> list[str]:
    """A new root: an empty tmpfs with what Python needs, all of it read-only, and the home. Returns what is there."""
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib")
    wanted = {*_DEVICES, *_LIBRARIES, python, *(os.path.realpath(p) for p in libraries), *room.site}
    quiet = kernel.MS_NOSUID | kernel.MS_NODEV
    os.umask(0o022)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", quiet, "mode=755,size=1m")
    os.mkdir(f"/tmp{_OLD}")
    kernel.pivot_root("/tmp", f"/tmp{_OLD}")
    os.chdir("/")
    places = [path for path in sorted(wanted, key=lambda p: p.count("/")) if _place(path)]
    os.mkdir(room.home)
    size = f"mode=1777,size={room.disk_bytes},nr_inodes=4096"
    kernel.mount("tmpfs", room.home, "tmpfs", quiet | kernel.MS_NOEXEC, size)
    if not os.path.lexists("/tmp"):
        os.symlink(room.home, "/tmp")
    kernel.detach(_OLD)
    os.rmdir(_OLD)
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | quiet)
    os.umask(0o077)
    return places


def _place(path: str) -> bool:
    """Mounts what the old root has at `path` at the same place, read-only, or makes the same link. False if there is
    nothing to be mounted, or it is there already as part of another."""
    old = _OLD + path
    if not os.path.lexists(old) or os.path.lexists(path):
        return False
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return False
    if os.path.isdir(old):
        os.mkdir(path, 0o755)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644))
    kernel.mount(old, path, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.read_only(path, device=stat.S_ISCHR(os.stat(old).st_mode))
    return True


def _limit(room: Room) -> None:
    """Hard limits; none is raised. Processes only in a namespace of its own, where nobody else is counted."""
    limits = {
        resource.RLIMIT_AS: room.memory,
        resource.RLIMIT_CPU: room.seconds,
        resource.RLIMIT_FSIZE: room.file_bytes,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if room.closed:
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _descriptors(channel: int, problems: int) -> None:
    """Nothing stays open but /dev/null as the standard three, the channel, and `problems` until Python runs."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor, place in ((channel, _PROBLEMS + 1), (problems, _PROBLEMS), (nothing, _PROBLEMS + 2)):
        os.dup2(descriptor, place, inheritable=False)
    for place in (0, 1, 2):
        os.dup2(_PROBLEMS + 2, place)
    os.dup2(_PROBLEMS + 1, CHANNEL)
    os.closerange(CHANNEL + 1, _PROBLEMS)
    os.closerange(_PROBLEMS + 1, 1 << 16)
