"""What a checkpoint weighs, how long saving it takes, and how much notice a platform must give.

A checkpoint (train/checkpoint.py, engines/learner_state.py) holds, whatever the ZeRO stage,

    learner/  float32 weights and two moments        12 bytes a parameter, each rank its share (ZeRO-0: rank 0 all)
    hf/       the weights in the model's dtype       2 or 4 bytes a parameter, all by rank 0

and is read once more by the driver when it is committed, to hash it and to force it to the disk.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.config.schema import Config
from rlkd.core.interval import interval_s
from rlkd.plan.hardware import GPUS, cpu
from rlkd.plan.precision import weight_size, zero_stage
from rlkd.plan.seconds import learn_s
from rlkd.plan.shape import Shape
from rlkd.plan.work import assumed, work_of

STATE_BYTES = 12  # a parameter: float32 weight, exp_avg, exp_avg_sq
WRITE_BYTES_PER_S = 0.4e9  # of one rank, to a plain virtual disk: 2.15 GB of SmolLM2-135M were saved in 6.3 s
COMMIT_BYTES_PER_S = 2.0e9  # hashing (blake3) what was just written
UPLOAD_BYTES_PER_S = 0.1e9  # to an object store, one connection: assumed, not measured
AROUND_S = 1.0  # names, manifests, the answers of the ranks
SAFETY = 1.5  # a step and a save on a busy machine; as preempt.py reckons
STEP_ROOM = 10  # seconds: what grace is rounded up to
LEAST_GRACE_S = 60
LEAST_STEP_S, FEW_CORES = 30.0, 2


@dataclass(frozen=True)
class Checkpoint:
    """Bytes of one checkpoint."""

    learner: int
    hf: int

    @property
    def total(self) -> int:
        return self.learner + self.hf


def checkpoint(parameters: int, weight_bytes: int) -> Checkpoint:
    """Of a model with so many parameters, `weight_bytes` each in the model's dtype (2: bfloat16, 4: float32)."""
    return Checkpoint(STATE_BYTES * parameters, weight_bytes * parameters)


def save_seconds(
    parameters: int, writers: int = 1, bytes_per_s: float = WRITE_BYTES_PER_S, weight_bytes: int = 4
) -> float:
    """Seconds of a save: `writers` ranks write the state at once (1 under ZeRO-0), each at `bytes_per_s`; rank 0 then
    writes hf/, and the driver reads and hashes everything."""
    size = checkpoint(parameters, weight_bytes)
    written_s = (size.learner / writers + size.hf) / bytes_per_s
    return AROUND_S + written_s + size.total / COMMIT_BYTES_PER_S


def upload_seconds(parameters: int, weight_bytes: int = 4, bytes_per_s: float = UPLOAD_BYTES_PER_S) -> float:
    """Seconds to copy a checkpoint to the remote store."""
    return checkpoint(parameters, weight_bytes).total / bytes_per_s


@dataclass(frozen=True)
class Grace:
    """Seconds that a platform must leave between its notice (SIGTERM) and its kill.

    A run that is asked to stop waits for the optimizer step under way (`drain_s`), saves (`save_s`), and gives uploads
    at most half of what is then left (job.py: closing). `measured`: the save and the step are of an earlier attempt.
    """

    drain_s: float
    save_s: float
    upload_s: float
    margin_s: float
    measured: bool = False

    @property
    def total_s(self) -> int:
        """What to tell the platform: rounded up to 10 s, at least 60."""
        needed = SAFETY * (self.drain_s + self.save_s) + 2 * self.upload_s + self.margin_s
        return max(LEAST_GRACE_S, STEP_ROOM * math.ceil(needed / STEP_ROOM))


def grace(config: Config, shape: Shape, drain_s: float | None = None, run: Path | None = None) -> Grace:
    """For the run that `config` describes, of a model of this shape (`shape_of(config.model.path)`).

    `drain_s`: seconds of one optimizer step, None: as on H100s, or two cores, and 30 at least. `run`: the run's folder;
    what earlier attempts measured there wins over the prediction.
    """
    parameters, weight_bytes = shape.parameters, weight_size(config)
    writers = 1 if zero_stage(config) == 0 else config.learner.ranks
    found = measured(run) if run is not None else Measured()
    save_s = found.save_s if found.save_s is not None else save_seconds(parameters, writers, weight_bytes=weight_bytes)
    step_s = found.step_s if found.step_s is not None else drain_s
    if step_s is None:
        step_s = max(LEAST_STEP_S, _learn_s(config, shape))
    most = config.checkpoint.upload_wait_s
    upload_s = min(most, upload_seconds(parameters, weight_bytes)) if config.checkpoint.remote else 0.0
    return Grace(step_s, save_s, upload_s, config.preempt.margin_s, found.save_s is not None)


def _learn_s(config: Config, shape: Shape) -> float:
    """Of one optimizer step, on machines that nobody named."""
    machine = cpu(0.0, FEW_CORES) if config.model.device == "cpu" else GPUS["H100"]
    return learn_s(config, shape, work_of(config, assumed(config, shape)), machine)


@dataclass(frozen=True)
class Measured:
    """The longest save and optimizer step of a run so far, in seconds; None: none is known."""

    save_s: float | None = None
    step_s: float | None = None


def measured(run: Path) -> Measured:
    """Of the run in this folder, from events.jsonl and metrics.jsonl. Lines that cannot be read are of a run that is
    writing, or was killed: they are passed over."""
    saves = [e["seconds"] for e in _rows(run / "events.jsonl") if e.get("kind") == "checkpoint"
             and isinstance(e.get("seconds"), int | float)]  # fmt: skip
    steps = [
        r["seconds/learn"] for r in _rows(run / "metrics.jsonl") if isinstance(r.get("seconds/learn"), int | float)
    ]
    return Measured(max(saves, default=None), max(steps, default=None))


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


__all__ = ["Checkpoint", "Grace", "checkpoint", "grace", "interval_s", "measured", "save_seconds", "upload_seconds"]
