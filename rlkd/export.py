"""A checkpoint's model as a Hugging Face folder, proven by loading it again.

Every checkpoint holds the folder already (`hf/`), and `probe.json`: tokens and the log-probs that the learner itself
gave them when it saved. Loading the copy with plain transformers must give the same.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from rlkd.core.errors import CheckpointError, PreflightError
from rlkd.models.folder import new_folder
from rlkd.store.manifest import MANIFEST
from rlkd.store.names import step_of
from rlkd.store.store import Store

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}  # largest difference of a log-prob; bfloat16 keeps 8 bits


def checkpoints(run_directory: Path) -> dict[int, Path]:
    """The run's complete checkpoints by step."""
    found = run_directory.glob(f"checkpoints/step-*/{MANIFEST}")
    return {step: p.parent for p in found if (step := step_of(p.parent.name)) is not None}


def step_there(run_directory: Path, step: int | None = None) -> int:
    """`step`, or that of the newest checkpoint. CheckpointError with those that there are if it is not among them."""
    found = checkpoints(run_directory)
    wanted = max(found, default=None) if step is None else step
    if wanted is None or wanted not in found:
        have = ", ".join(str(s) for s in sorted(found)) or "none"
        raise CheckpointError(
            "RLKD-K002",
            "the run has no checkpoint yet" if wanted is None else f"the run has no checkpoint of step {wanted}",
            where=str(run_directory),
            fix=f"complete checkpoints: {have}",
        )
    return wanted


def newest(run_directory: Path, step: int | None = None) -> Path:
    """The `hf` folder of the checkpoint after `step`, or of the newest. CheckpointError if there is none."""
    step_there(run_directory, step)
    store = Store(run_directory / "checkpoints")
    whole = store.newest(mend=False) if step is None else store.at(step)  # every byte of it verified
    assert whole is not None
    return whole.path / "hf"


def export(run_directory: Path, step: int | None, directory: Path) -> float:
    """Copy the folder to `directory` (new), load it, compare; the largest difference of a log-prob.

    PreflightError RLKD-E133 if the copy does not compute what the learner computed; then `directory` is not made.
    """
    source = newest(run_directory, step)
    probe = json.loads((source.parent / "probe.json").read_text())
    with new_folder(directory) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        worst = difference(folder, probe["tokens"], probe["logp"])
        bound = TOLERANCE[probe["dtype"]]
        if not worst <= bound:
            raise PreflightError(
                "RLKD-E133",
                f"the exported model's log-probs are off from the learner's by {worst:.3g}, bound {bound:g}",
                where=str(source),
                fix="export another step (--step), and report this with the checkpoint's probe.json",
            )
    return worst


def difference(folder: Path, tokens: list[int], logp: list[float | None]) -> float:
    """The largest |Δ log π(tokens[t] | <t)|, t ≥ 1, between the folder's model and `logp`; float32 on CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    found = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    return float(np.abs(found - np.array(logp[1:], np.float32)).max())
