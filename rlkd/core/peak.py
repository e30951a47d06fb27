"""The most memory that this process has held."""

import resource
from pathlib import Path

import torch

GIB = 2**30


def peak_bytes(device: str = "cpu") -> int:
    """Bytes: resident on a CPU, allocated by torch on a GPU.

    Linux' VmHWM, for what getrusage says of a process may be what started it (the kernel keeps its peak over exec).
    """
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
