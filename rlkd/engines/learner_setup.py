"""How a rank of the learner is made: its options, its place among the others, and DeepSpeed's settings."""

import logging
import os
import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from rlkd.engines.model import ModelOptions
from rlkd.engines.optimizer import Shape

BUCKET = 50_000_000  # gradient elements reduced at once


@dataclass(frozen=True)
class RankOptions:
    """How a rank is made; names as in the recipe's `learner`."""

    model: ModelOptions
    steps: int  # of the whole run, for the learning rate's schedule
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_schedule: Shape = "constant"
    max_grad_norm: float = 1.0
    zero_stage: Literal[0, 1, 2, 3] | None = None  # None: 0 on one rank, 1 on several
    offload: bool = False
    timeout_s: float = 1800.0  # of collectives
    threads: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite: end, or leave the step out
    max_nonfinite: int = 3  # steps left out in a row, for "skip"
    deterministic: bool = False  # the same bits in every run; operators that cannot do it raise
    debug_directory: str | None = None  # where a micro-batch with a loss that is not finite is written
    check_agreement: bool = True


@dataclass(frozen=True)
class Place:
    """This rank among the others. Several ranks need a store that all of them reach."""

    rank: int = 0
    ranks: int = 1
    store: dist.Store = field(default_factory=dist.HashStore)


def steady(options: RankOptions, rank: int) -> None:
    """Threads, and for a deterministic run everything else that could make two runs differ. Before the model loads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.deterministic:
        return
    if not options.threads:
        torch.set_num_threads(1)  # torch's own number is the machine's, and the next attempt may run on another
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


def join(place: Place, device: torch.device, timeout_s: float) -> None:
    """Meet the other ranks. One process can have only one process group."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray shows an actor only its own GPU
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # a kernel for inference that DeepSpeed would compile at every first start on a CPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=place.store,
            rank=place.rank,
            world_size=place.ranks,
            timeout=timedelta(seconds=timeout_s),
        )
    elif dist.get_world_size() != place.ranks:
        raise RuntimeError(f"this process is in a group of {dist.get_world_size()} ranks, not of {place.ranks}")


def deepspeed_config(stage: int, low: bool, max_grad_norm: float, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET, "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if low:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


__all__ = ["Place", "RankOptions", "deepspeed_config", "join", "steady"]
