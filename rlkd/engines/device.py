"""Where a model computes and in which precision."""

from pathlib import Path
from typing import Literal

import torch

from rlkd.core.errors import PreflightError


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """auto: a GPU where there is one. PreflightError if one is asked for and there is none."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise PreflightError(
            "RLKD-E603",
            "model.device=cuda, but this process sees no GPU",
            where=f"torch {torch.__version__}",
            fix="give the worker a GPU (ray: num_gpus), install the GPU build (rlkd[gpu]), or set model.device=cpu",
        )
    return "cuda" if found and device != "cpu" else "cpu"


def pick_dtype(dtype: Literal["auto", "float32", "bfloat16"], device: str) -> torch.dtype:
    """auto: bfloat16 on GPU; on CPU float32 unless the processor multiplies bfloat16 matrices (AMX).

    Without AMX bfloat16 was measured 4–5 times slower than float32 on a CPU, avx512_bf16 or not.
    """
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if device == "cuda" or _has_amx() else torch.float32


def _has_amx() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and " amx_bf16 " in info.read_text().replace("\n", " ")
