"""The random generators of one process – Python's, NumPy's, torch's, the GPU's – as plain JSON, and back.

Restore them last: whatever draws after that makes the run another one.
"""

import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """Where every generator stands now. Nothing is drawn."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator back to where `capture` found it; the GPU's if there is one now and was one then.

    Raises ValueError, KeyError, TypeError or RuntimeError for what `capture` did not write.
    """
    version, words, gauss = state["python"]
    kind, keys, place, has_gauss, cached = state["numpy"]
    torch_state = _tensor(state["torch"])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, np.array(keys, np.uint32), place, has_gauss, cached))
    torch.set_rng_state(torch_state)
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


__all__ = ["capture", "restore"]
