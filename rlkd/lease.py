"""One process at a time in a run's folder. What a killed process leaves behind never needs deleting by hand.

`.lease` says who holds the folder: pid, host, when that process and its machine were started, a heartbeat. A second
process is refused while the first may be alive. On the same machine that is known: the process is there or it is not,
and a number that was given again belongs to a process with another start. Of another machine (or container) only the
heartbeat is seen: the second process waits until it moves (refused), or has stood still for `lease_s` (taken over).

The heartbeat's age is the file's own, by the file server's clock: two machines' clocks may differ. `flock` on
`.lease.lock` keeps two processes from taking over at once; the system drops it with the process.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from rlkd.core.errors import PreflightError

NAME, LOCK = ".lease", ".lease.lock"
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems
NEAR_S = 0.05  # two starts of a process so close are the same: psutil rounds


@dataclass(frozen=True)
class Holder:
    """A process, known by more than its number, which the system gives again."""

    pid: int
    started: float  # of the process, Unix time by its machine
    host: str
    boot: str  # id of the machine's boot and of the container's process numbers: pids compare only where it is equal
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def me(cls) -> "Holder":
        process = psutil.Process()
        return cls(process.pid, process.create_time(), socket.gethostname(), _boot())

    @classmethod
    def of(cls, record: Mapping[str, object]) -> "Holder":
        """TypeError, KeyError or ValueError if it is none."""
        pid, started = int(str(record["pid"])), float(str(record["started"]))
        return cls(pid, started, str(record["host"]), str(record["boot"]), str(record["key"]))

    def alive(self) -> bool | None:
        """Whether the process is there; None where that cannot be seen from here."""
        if self.boot != _boot():
            return None
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < NEAR_S and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@contextmanager
def held(
    directory: Path,
    lease_s: float,
    say: Callable[[str], None],
    lost: Callable[[Holder], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Holder]:
    """Hold the folder (made if need be). PreflightError RLKD-E160 if somebody else does. `lost` is called in a thread
    when another process has taken it, which happens after this one stood still for longer than `lease_s`."""
    directory.mkdir(parents=True, exist_ok=True)
    me = Holder.me()
    _take(directory, me, lease_s, say, sleep)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(directory, me, lease_s, ended, lost), name="lease", daemon=True)
    beats.start()
    try:
        yield me
    finally:
        ended.set()
        beats.join()
        with _locked(directory):
            if holder(directory) == me:
                (directory / NAME).unlink()


def holder(directory: Path) -> Holder | None:
    """Who says to hold the folder; None for nobody, or for a file that a full disk or a crash left unreadable."""
    try:
        return Holder.of(json.loads((directory / NAME).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def age_s(directory: Path) -> float:
    """Seconds since the last heartbeat, by the file server's clock; 0 if there is no lease."""
    mark = directory / f"{NAME}.{os.getpid()}.now"
    try:
        mark.touch()
        return max(0.0, mark.stat().st_mtime - (directory / NAME).stat().st_mtime)
    except FileNotFoundError:
        return 0.0
    finally:
        mark.unlink(missing_ok=True)


def _take(
    directory: Path, me: Holder, lease_s: float, say: Callable[[str], None], sleep: Callable[[float], None]
) -> None:
    """Write the lease, as soon as nobody alive has one."""
    seen: float | None = None  # the heartbeat that is watched
    while True:
        with _locked(directory):
            other = holder(directory)
            alive = False if other is None else other.alive()
            if alive is False or (alive is None and age_s(directory) > lease_s):
                _write(directory, me)
                return
            beat, age = (directory / NAME).stat().st_mtime, age_s(directory)
        assert other is not None
        if alive or (seen is not None and beat != seen):
            raise _refused(directory, other, age, bool(alive))
        if seen is None:
            what = f"process {other.pid} on {other.host} held this run {age:.0f} s ago"
            say(f"{what}: waiting up to {max(lease_s - age, 0):.0f} s to see whether it is alive")
        seen = beat
        sleep(min(1.0, lease_s / 4))


def _refused(directory: Path, other: Holder, age: float, here: bool) -> PreflightError:
    where = "on this machine" if here else f"on {other.host}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.started))
    return PreflightError(
        "RLKD-E160",
        f"another process works in this folder: pid {other.pid} {where}, started {since}, last sign {age:.0f} s ago",
        where=str(directory),
        fix="wait for it, end it, or give another name=…",
    )


def _beat(directory: Path, me: Holder, lease_s: float, ended: threading.Event, lost: Callable[[Holder], None]) -> None:
    while not ended.wait(lease_s / 4):
        try:
            with _locked(directory):
                now = holder(directory)
                if now == me:
                    os.utime(directory / NAME)
                elif now is None:  # deleted by somebody who holds nothing
                    _write(directory, me)
            if now not in (me, None):
                lost(now)
                return
        except OSError:
            continue  # a disk that is away for a while: the next beat tries again; the age says so to others


def _write(directory: Path, me: Holder) -> None:
    temporary = directory / f"{NAME}.{me.key}"
    try:
        temporary.write_text(json.dumps(asdict(me)), encoding="utf-8")
        os.replace(temporary, directory / NAME)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Alone among this machine's processes, and among all where the file system knows flock."""
    file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        yield
    finally:
        os.close(file)


def _boot() -> str:
    """Of this boot of this machine, and of this container's own process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"
