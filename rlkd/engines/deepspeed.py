"""One rank of the learner: the policy inside a DeepSpeed engine.

What was read in DeepSpeed 0.19.8 and is tested here. With gradient_accumulation_steps=1 `backward` divides by nothing,
and `set_gradient_accumulation_boundary` says which micro-batch is the step's last, so their number may differ from step
to step. Gradients are *averaged* over ranks while losses are shares of a sum: hence `* ranks`, once, in `_backward`.
ZeRO 1–3 leave the weights alone if the gradient's norm is not finite; ZeRO-0 would step: `GuardedAdamW` looks first.
"""

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rlkd.core import kl
from rlkd.core.batch import MicroBatch, Shares
from rlkd.core.errors import CheckpointError, DivergedError, PreflightError
from rlkd.core.ports import Algorithm, Knobs, Loss, PolicyOutput
from rlkd.core.types import TRAINED, Origin
from rlkd.engines.agreement import check_agreement, probe_batch
from rlkd.engines.device import pick_device
from rlkd.engines.model import ModelOptions, Policy
from rlkd.engines.optimizer import GuardedAdamW, Shape, decayed, finite_norm, learning_rate

TAG = "state"  # of the checkpoint inside the directory given to `save`
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
    debug_directory: str | None = None  # where a micro-batch with a loss that is not finite is written
    check_agreement: bool = True


@dataclass(frozen=True)
class Place:
    """This rank among the others. Several ranks need a store that all of them reach."""

    rank: int = 0
    ranks: int = 1
    store: dist.Store = field(default_factory=dist.HashStore)


class Rank:
    """One process of the learner. All ranks must make the same calls in the same order."""

    def __init__(self, algorithm: Algorithm, options: RankOptions, place: Place | None = None) -> None:
        place = place or Place()
        self.algorithm, self.options, self.ranks, self.rank = algorithm, options, place.ranks, place.rank
        self.step = 0  # optimizer steps taken
        self.device = torch.device(pick_device(options.model.device))
        if options.offload and self.device.type == "cpu":
            raise PreflightError(
                "RLKD-E145", "learner.offload=true, but the learner is on a CPU already", where="learner.offload",
                fix="set learner.offload=false",
            )  # fmt: skip
        if options.threads:
            torch.set_num_threads(options.threads)
        self.stage = 1 if place.ranks > 1 else 0
        if options.zero_stage is not None:
            self.stage = options.zero_stage
        _join(place, self.device, options.timeout_s)
        # ZeRO-3 takes the weights from host memory, for a model that does not fit into one GPU
        self.policy = Policy.load(options.model, "cpu" if self.stage == 3 else None)
        if options.check_agreement:
            check_agreement(self.policy)
        self.engine = self._engine()

    def _engine(self) -> Any:
        import deepspeed

        low = next(self.policy.parameters()).dtype == torch.bfloat16
        if low and self.stage == 0:
            self.stage = 1  # bfloat16 weights need a float32 copy to be stepped, and ZeRO-1 keeps it
        o = self.options
        self.optimizer = GuardedAdamW(
            decayed(self.policy, o.weight_decay), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True
        )
        engine, *_ = deepspeed.initialize(
            model=self.policy,
            optimizer=self.optimizer,
            config=_config(self.stage, low, o.max_grad_norm, o.offload),
            dist_init_required=False,
        )
        if self.stage == 0:
            self.optimizer.clip_to = o.max_grad_norm
        else:
            self.optimizer.norm_from = engine.optimizer
        if self.ranks == 1 and self.stage == 0:
            engine.enable_backward_allreduce = False  # it would copy every gradient twice for nobody
        return engine

    # --- training

    def update(self, mine: Sequence[MicroBatch], knobs: Knobs) -> Shares:
        """One optimizer step on this rank's micro-batches; their number may change from step to step.

        Raises DivergedError before any weight moves if a loss or the gradient is not finite.
        """
        shares = Shares()
        seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        for turn, x in enumerate(mine):
            self.engine.set_gradient_accumulation_boundary(turn == len(mine) - 1)
            x = x.to(self.device)
            began = perf_counter()
            pi = self.policy.output(x, self.engine)
            loss = self.algorithm.loss(pi, x, knobs)
            self._check_loss(loss, pi, x)
            seconds["forward"] += perf_counter() - began
            began = perf_counter()
            self.engine.backward(loss.value * (x.weight * self.ranks))
            seconds["backward"] += perf_counter() - began
            metrics, maxima = _diagnosed(pi, x)
            shares.add({**metrics, **loss.metrics, "loss": loss.value.detach()}, {**maxima, **loss.maxima}, x.weight)
        began = perf_counter()
        rate, norm = self._step(mine)
        seconds["optimizer"] = perf_counter() - began
        once = {"grad_norm": norm, "lr": rate, **{f"learn/{k}_s": s for k, s in seconds.items()}}
        shares.add({}, {name: torch.tensor(value, dtype=torch.float64) for name, value in once.items()}, 1.0)
        return shares

    def _step(self, mine: Sequence[MicroBatch]) -> tuple[float, float]:
        """Move the weights; (learning rate, norm of the gradient before clipping)."""
        o = self.options
        rate = learning_rate(self.step, o.lr, o.warmup_steps, o.steps, o.lr_schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if not finite_norm(norm):
            where = [self._dump(f"gradient-{i}", x) for i, x in enumerate(mine)]
            raise DivergedError(
                "RLKD-T141",
                f"step {self.step + 1}: the gradient is not finite (norm {norm})",
                where=where[0] if where else None,
                fix="the weights have not moved; look at the micro-batches written there, lower learner.lr",
            )
        self.step += 1
        return rate, float(norm)

    def _check_loss(self, loss: Loss, pi: PolicyOutput, x: MicroBatch) -> None:
        value = float(loss.value.detach())
        if math.isfinite(value):
            return
        where = self._dump("loss", x, logp=pi.logp.detach().cpu(), entropy=pi.entropy.detach().cpu())
        raise DivergedError(
            "RLKD-T140",
            f"step {self.step + 1}: the loss is {value}",
            where=where,
            fix="the weights have not moved; the micro-batch and its log-probs are written there",
        )

    def _dump(self, why: str, x: MicroBatch, **more: Tensor) -> str:
        """Write a micro-batch for people to look at (`torch.load`); where, or why not."""
        if self.options.debug_directory is None:
            return f"rank {self.rank}; set a debug directory to have the micro-batch written"
        directory = Path(self.options.debug_directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"step-{self.step + 1:06d}-rank-{self.rank}-{why}.pt"
        x = x.to("cpu")
        plain = {f.name: getattr(x, f.name) for f in fields(x) if f.name != "totals"}
        torch.save({**plain, **more, "streams": dict(x.streams), "totals": asdict(x.totals)}, path)
        return str(path)

    # --- weights out

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) in the model's order, valid until the next one; tied weights come once.

        Under ZeRO-3 a layer is gathered at a time, on all ranks together. Raises DivergedError for a tensor that is
        not finite.
        """
        import deepspeed

        named = list(self.policy.model.named_parameters())
        for _, layer in groupby(named, key=lambda pair: _layer(pair[0])):
            part = list(layer)
            gather = deepspeed.zero.GatheredParameters([p for _, p in part]) if self.stage == 3 else nullcontext()
            with gather:
                for name, p in part:
                    yield name, self._finite(name, p.detach())

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        # a sum is not finite if a term is not; the reverse is looked at more closely
        if not bool(weight.sum().isfinite()) and not bool(weight.isfinite().all()):
            raise DivergedError(
                "RLKD-T142",
                f"the weight {name} is not finite after step {self.step}; it was not published",
                fix="go back to a checkpoint and lower learner.lr",
            )
        return weight

    def export(self, folder: str) -> None:
        """A Hugging Face folder: config, safetensors, and every other file of the start (tokenizer, chat template)."""
        gathered = self.stage == 3  # and let go of again: what shall stay is copied
        state = {name: w.cpu().clone() if gathered else w for name, w in self.weights()}
        if self.rank != 0:
            return
        self.policy.model.save_pretrained(folder, state_dict=state)
        for file in Path(self.options.model.path).iterdir():
            if file.is_file() and not _made_by_save(file.name) and not (Path(folder) / file.name).exists():
                shutil.copy(file, folder)

    def probe(self, length: int = 32) -> dict[str, Any]:
        """Random tokens and the log-probs this model gives them at temperature 1 (first: None): to test an export."""
        x = probe_batch(self.policy.vocabulary, length).to(self.device)
        with torch.no_grad(), self.policy.at_temperature(1.0):
            logp = self.policy.output(x, self.engine).logp
        dtype = str(next(self.policy.parameters()).dtype).removeprefix("torch.")
        return {"tokens": x.tokens.tolist(), "logp": [None, *logp[1:].tolist()], "dtype": dtype}

    # --- checkpoints

    def save(self, directory: str) -> None:
        """Weights, optimizer and step, in DeepSpeed's files; every rank writes its part."""
        self.engine.save_checkpoint(directory, tag=TAG, client_state={"rlkd_step": self.step})

    def load(self, directory: str) -> None:
        """CheckpointError unless the directory holds what `save` wrote with the same ranks and ZeRO stage."""
        try:
            found, state = self.engine.load_checkpoint(directory, tag=TAG, load_lr_scheduler_states=False)
        except (
            Exception
        ) as error:  # DeepSpeed raises whatever it trips over; a checkpoint must load whole or not at all
            raise _unreadable(directory, f"{type(error).__name__}: {error}") from error
        if found is None or "rlkd_step" not in state:
            raise _unreadable(directory, "no learner state in it")
        self.step = state["rlkd_step"]

    def close(self) -> None:
        """Let go of the model. The process group stays: it is the process's."""
        self.engine.destroy()


def _diagnosed(pi: PolicyOutput, x: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shares and maxima every algorithm has: counts, entropy, and how far sampler and learner are apart."""
    sampled, logp = x.mask(Origin.POLICY), pi.logp.detach()
    apart = logp - x.behavior_logp
    metrics = {
        "tokens": x.mask(TRAINED).sum(),
        "entropy": x.mean(pi.entropy.detach(), Origin.POLICY),
        "mismatch/mean": x.mean(apart.abs(), Origin.POLICY),
        "mismatch/kl": x.mean(kl.k3(x.behavior_logp, logp), Origin.POLICY),  # of KL(μ ‖ π): the tokens are μ's
    }
    return metrics, {"mismatch/max": apart[sampled].abs().max()} if bool(sampled.any()) else {}


def _join(place: Place, device: torch.device, timeout_s: float) -> None:
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


def _config(stage: int, low: bool, max_grad_norm: float, offload: bool) -> dict[str, Any]:
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


def _layer(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `model.layers.3`; a name without a number is a layer of its own."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _made_by_save(name: str) -> bool:
    return name in ("config.json", "README.md") or name.endswith(
        (".safetensors", ".bin", ".index.json", ".gguf", ".pt")
    )


def _unreadable(directory: str, why: str) -> CheckpointError:
    return CheckpointError(
        "RLKD-K140",
        f"the learner's checkpoint cannot be loaded: {why}",
        where=directory,
        fix="use the learner.ranks and learner.zero_stage it was saved with, or move it away to use the one before",
    )
