"""The machine: processors, memory, shared memory, files, disk, threads."""

import os
import resource
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from rlkd.doctor.check import Check

GIB = 2**30
SOCKET_LIMIT = 107  # bytes of a Unix socket's path on Linux
SESSION = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # what Ray puts below its folder


def gpu() -> Check:
    names, trouble = _ask_driver()
    if trouble:
        fix = "nvidia-smi is there but does not work: mend the driver, or set CUDA_VISIBLE_DEVICES= to do without"
        return Check("gpu", "warn", trouble, fix)
    return Check("gpu", "ok", f"{len(names)}: {', '.join(names)}" if names else "none; everything runs on the CPU")


def gpus() -> list[str]:
    """The names of the NVIDIA GPUs that this process may use, from the driver, without CUDA."""
    return _ask_driver()[0]


@cache
def _ask_driver() -> tuple[list[str], str | None]:
    """The GPUs' names, and what went wrong when asking for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (visible is not None and visible.strip() in ("", "-1")) or shutil.which("nvidia-smi") is None:
        return [], None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (subprocess.TimeoutExpired, OSError) as e:
        return [], str(e)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return [], lines[-1] if lines else f"nvidia-smi: exit {done.returncode}"
    return [line.strip() for line in done.stdout.splitlines() if line.strip()], None


def cpu() -> Check:
    """Cores that may be used, and which dtype is fast on them."""
    cores, flags = usable_cores(), cpu_flags()
    level = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if f in flags), None)
    dtype = "bfloat16 and float32 are fast" if level == "amx_bf16" else "float32 is faster than bfloat16"
    if cores < 2:
        return Check("cpu", "warn", f"{cores:g} core", "rollout and learner take turns on it: use 2 cores or more")
    if level is None and not gpus():
        fix = "vLLM's CPU build needs AVX2 or AVX-512 (x86) or ASIMD (ARM); use sampler.engine=hf"
        return Check("cpu", "warn", f"{cores:g} cores without vector instructions that vLLM uses", fix)
    return Check("cpu", "ok", f"{cores:g} cores, {level or 'unknown instructions'}: {dtype}")


def usable_cores() -> float:
    """Cores of this process: its affinity, or less where a container has a quota."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = read_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def cpu_flags() -> set[str]:
    for line in read_text("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def memory() -> Check:
    """Free memory; a container's limit counts."""
    fields = {line.split(":")[0]: line.split()[1] for line in read_text("/proc/meminfo").splitlines() if ":" in line}
    total, free = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = read_words("/sys/fs/cgroup/memory.max")
    if limit and limit[0] != "max" and int(limit[0]) < total:
        used = read_words("/sys/fs/cgroup/memory.current")
        total = int(limit[0])
        free = min(free, total - int(used[0]) if used else total)
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 4 * GIB:
        return Check("memory", "warn", detail, "close other programs; lower sampler.kv_cache_gib, learner.max_tokens")
    return Check("memory", "ok", detail)


def shared_memory() -> Check:
    """/dev/shm holds Ray's object store and, unless sync.kind=disk, the weights on their way to the rollout workers."""
    path = "/dev/shm"
    if not os.path.isdir(path):
        return Check("/dev/shm", "fail", "there is none", "mount a tmpfs there; in a container: --shm-size=8g")
    free = shutil.disk_usage(path).free
    detail = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return Check(
            "/dev/shm", "fail", detail, "in a container: --shm-size=8g; else `mount -o remount,size=8g /dev/shm`"
        )
    if free < 4 * GIB:
        return Check("/dev/shm", "warn", detail, "enough for models below 1 B; else --shm-size=8g, or sync.kind=disk")
    return Check("/dev/shm", "ok", detail)


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return Check("ulimit -n", "warn", f"{shown}: Ray opens many files", f"ulimit -n {most}")
    return Check("ulimit -n", "ok", shown)


def socket_path() -> Check:
    """Ray's sockets lie in its temporary folder; a path over 107 bytes cannot be a socket's."""
    folder = os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    length = len(os.fsencode(os.path.join(folder, SESSION)))
    if length > SOCKET_LIMIT:
        detail = f"{folder}: Ray's sockets there would have {length} bytes, {SOCKET_LIMIT} are allowed"
        return Check("socket path", "fail", detail, "export RAY_TMPDIR=/tmp")
    return Check("socket path", "ok", f"{length} of {SOCKET_LIMIT} bytes in {folder}")


def disk() -> Check:
    """Space for runs in this folder, and for Ray in the temporary one."""
    places = {"here": os.getcwd(), "temporary": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()}
    free = {name: shutil.disk_usage(path).free for name, path in places.items() if os.path.isdir(path)}
    detail = ", ".join(f"{name} {size / GIB:.0f} GiB free" for name, size in free.items())
    least = min(free.values(), default=0)
    if least < GIB:
        return Check("disk", "fail", detail, "free some space; RAY_TMPDIR and report.directory may lie elsewhere")
    if least < 10 * GIB:
        return Check("disk", "warn", detail, "a checkpoint holds 12 bytes a parameter and more; see checkpoint.keep")
    return Check("disk", "ok", detail)


def threads() -> Check:
    """rlkd plans threads over all processes of a machine; a variable of the shell would be in its way."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value is None:
        return Check("threads", "ok", "OMP_NUM_THREADS is not set: rlkd plans the threads of each process")
    if not value.isdigit() or int(value) < 1:
        return Check("threads", "warn", f"OMP_NUM_THREADS={value} is no number of threads", "unset OMP_NUM_THREADS")
    if int(value) > usable_cores():
        detail = f"OMP_NUM_THREADS={value} on {usable_cores():g} cores: processes would slow each other down"
        return Check("threads", "warn", detail, "unset OMP_NUM_THREADS")
    return Check("threads", "ok", f"OMP_NUM_THREADS={value}")


def read_text(path: str) -> str:
    """A file of the system; "" where this system has none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def read_words(path: str) -> list[str]:
    return read_text(path).split()
