"""One rank of the learner: the policy inside a DeepSpeed engine.

What was read in DeepSpeed 0.19.8 and is tested here. With gradient_accumulation_steps=1 `backward` divides by nothing,
and `set_gradient_accumulation_boundary` says which micro-batch is the step's last, so their number may differ from step
to step. Gradients are *averaged* over ranks while losses are shares of a sum: hence `* ranks`, once, in `_backward`.
ZeRO 1–3 leave the weights alone if the gradient's norm is not finite; ZeRO-0 would step: `GuardedAdamW` looks first.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlkd.core import kl
from rlkd.core.batch import MicroBatch, Shares
from rlkd.core.errors import PreflightError
from rlkd.core.faults import fault
from rlkd.core.peak import GIB, peak_bytes
from rlkd.core.ports import Algorithm, Knobs, Loss, PolicyOutput
from rlkd.core.types import TRAINED, Origin
from rlkd.engines import nonfinite, rng
from rlkd.engines.agreement import check_agreement, probe_batch
from rlkd.engines.device import pick_device
from rlkd.engines.learner_setup import Place, RankOptions, deepspeed_config, join, steady
from rlkd.engines.learner_state import Counts, LearnerState
from rlkd.engines.model import Policy
from rlkd.engines.optimizer import GuardedAdamW, decayed, finite_norm, learning_rate


class Rank:
    """One process of the learner. All ranks must make the same calls in the same order."""

    def __init__(self, algorithm: Algorithm, options: RankOptions, place: Place | None = None) -> None:
        place = place or Place()
        self.algorithm, self.options, self.ranks, self.rank = algorithm, options, place.ranks, place.rank
        self.counts = Counts()
        self.device = torch.device(pick_device(options.model.device))
        if options.offload and self.device.type == "cpu":
            raise PreflightError(
                "RLKD-E145", "learner.offload=true, but the learner is on a CPU already", where="learner.offload",
                fix="set learner.offload=false",
            )  # fmt: skip
        steady(options, place.rank)
        self.stage = 1 if place.ranks > 1 else 0
        if options.zero_stage is not None:
            self.stage = options.zero_stage
        join(place, self.device, options.timeout_s)
        # ZeRO-3 takes the weights from host memory, for a model that does not fit into one GPU
        self.policy = Policy.load(options.model, "cpu" if self.stage == 3 else None)
        if options.check_agreement:
            check_agreement(self.policy)
        self.engine = self._engine()
        self.state = LearnerState(self.policy, self.engine, self.optimizer, self.rank, self.ranks)

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
            config=deepspeed_config(self.stage, low, o.max_grad_norm, o.offload),
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

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.counts.step

    def update(self, mine: Sequence[MicroBatch], knobs: Knobs) -> Shares:
        """One optimizer step on this rank's micro-batches; their number may change from step to step.

        If a loss or the gradient is not finite, no weight, moment or count moves on any rank: DivergedError, or, with
        on_nonfinite="skip", the metric `nonfinite` until it happens more than `max_nonfinite` times in a row.
        """
        shares = Shares()
        seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        bad: tuple[str, str] | None = None  # what was not finite here, and where it was written
        for turn, x in enumerate(mine):
            began = perf_counter()
            x = x.to(self.device)
            pi, loss = self._forward(x, knobs, last=turn == len(mine) - 1)
            bad = self._look_at_loss(loss, pi, x, turn) or bad
            seconds["forward"] += perf_counter() - began
            began = perf_counter()
            fault("learner.backward", self.rank)
            self._backward(loss, x)
            seconds["backward"] += perf_counter() - began
            metrics, maxima = _diagnosed(pi, x)
            shares.add({**metrics, **loss.metrics, "loss": loss.value.detach()}, {**maxima, **loss.maxima}, x.weight)
        began = perf_counter()
        rate, norm = self._step(mine, knobs, bad)
        seconds["optimizer"] = perf_counter() - began
        once = {"grad_norm": norm, "lr": rate, **{f"learn/{k}_s": s for k, s in seconds.items()}}
        once["memory/learner_peak_gib"] = peak_bytes(self.device.type) / GIB
        if self.options.on_nonfinite == "skip":
            once["nonfinite"] = float(self.counts.nonfinite > 0)
        shares.add({}, {name: torch.tensor(value, dtype=torch.float64) for name, value in once.items()}, 1.0)
        return shares

    def _forward(self, x: MicroBatch, knobs: Knobs, last: bool) -> tuple[PolicyOutput, Loss]:
        self.engine.set_gradient_accumulation_boundary(last)
        pi = self.policy.output(x, self.engine)
        return pi, self.algorithm.loss(pi, x, knobs)

    def _backward(self, loss: Loss, x: MicroBatch) -> None:
        self.engine.backward(loss.value * (x.weight * self.ranks))

    def _step(self, mine: Sequence[MicroBatch], knobs: Knobs, bad: tuple[str, str] | None) -> tuple[float, float]:
        """Move the weights, unless a rank says `bad`; (learning rate, norm of the gradient before clipping or NaN)."""
        o = self.options
        rate = learning_rate(self.step, o.lr, o.warmup_steps, o.steps, o.lr_schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        any_bad = o.on_nonfinite == "skip" and self._on_any_rank(bad is not None)
        fault("learner.step", self.rank)
        norm = self._move(veto=any_bad)
        if not any_bad and finite_norm(norm):
            self.counts = Counts(self.counts.step + 1, self.counts.skipped)
            return rate, float(norm)
        if bad is None:
            bad = ("a loss of another rank", "") if any_bad else self._find_gradient(mine, knobs)
        self._leave_out(norm, *bad)
        return rate, math.nan

    def _move(self, veto: bool) -> Any:
        """The optimizer's step, and the gradients are gone; with `veto` only that. The norm of the gradient."""
        self.optimizer.veto = veto
        self.engine.step()
        self.optimizer.veto = False
        return self.engine.get_global_grad_norm()

    def _on_any_rank(self, here: bool) -> bool:
        """All ranks must ask."""
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # --- what is not finite

    @property
    def _turn(self) -> int:
        """The step of the run that is under way, from 1."""
        return self.counts.step + self.counts.skipped + 1

    def _look_at_loss(self, loss: Loss, pi: PolicyOutput, x: MicroBatch, turn: int) -> tuple[str, str] | None:
        """What is behind a loss that is not finite, and where it was written. DivergedError if that ends the run."""
        value = float(loss.value.detach())
        if math.isfinite(value):
            return None
        local = ((name, getattr(p, "ds_tensor", p).detach()) for name, p in self.policy.model.named_parameters())
        what = f"the loss is {value} ({nonfinite.behind_loss(local, x, pi)})"
        where = self._dump(f"loss-{turn}", x, logp=pi.logp.detach().cpu(), entropy=pi.entropy.detach().cpu())
        if self.options.on_nonfinite == "skip":
            return what, where
        raise nonfinite.diverged("RLKD-T140", f"step {self._turn}: {what}", where)

    def _find_gradient(self, mine: Sequence[MicroBatch], knobs: Knobs) -> tuple[str, str]:
        """Whose gradient it was, and where that micro-batch was written: all ranks go through their micro-batches once
        more and look at each gradient. Generators are put back."""
        before = rng.capture(self.device)
        first: tuple[str, str] | None = None
        for turn, x in enumerate(mine):
            names: list[str] = []
            x = x.to(self.device)
            with nonfinite.watched_gradients(self.policy.model, names):
                pi, loss = self._forward(x, knobs, last=turn == len(mine) - 1)
                self._backward(loss, x)
            if names and first is None:
                what = f"that of {names[0]}, in micro-batch {turn + 1} of rank {self.rank}, was the first"
                first = what, self._dump(f"gradient-{turn}", x, logp=pi.logp.detach().cpu())
        self._move(veto=True)
        rng.restore(before, self.device)
        found: list[tuple[str, str] | None] = [None] * self.ranks
        dist.all_gather_object(found, first)
        known = [f for f in found if f is not None]
        return known[0] if known else ("that of each micro-batch alone is finite, their sum is not", "")

    def _leave_out(self, norm: Any, what: str, where: str) -> None:
        """Count a step that was left out. DivergedError if it ends the run."""
        turn, allowed = self._turn, self.options.max_nonfinite
        self.counts = Counts(self.counts.step, self.counts.skipped + 1, self.counts.nonfinite + 1)
        if self.options.on_nonfinite == "stop":
            raise nonfinite.diverged(
                "RLKD-T141", f"step {turn}: the gradient is not finite (norm {norm}): {what}", where
            )
        if self.counts.nonfinite > allowed:
            many = f"{self.counts.nonfinite} steps in a row were not finite, learner.max_nonfinite={allowed}"
            raise nonfinite.diverged("RLKD-T145", f"step {turn}: {many}; now {what}", where)

    def _dump(self, why: str, x: MicroBatch, **more: Tensor) -> str:
        name = f"step-{self._turn:06d}-rank-{self.rank}-{why}"
        return nonfinite.dump(self.options.debug_directory, name, x, **more)

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
                    yield name, nonfinite.finite_weight(name, p.detach(), self.step)

    def export(self, folder: str) -> None:
        """A Hugging Face folder: config, safetensors, and every other file of the start (tokenizer, chat template)."""
        if self.rank != 0:
            for _ in self.weights():  # gathered by all ranks together, kept by the first: a copy each fills a node
                pass
            return
        gathered = self.stage == 3  # and let go of again: what shall stay is copied
        state = {name: w.cpu().clone() if gathered else w for name, w in self.weights()}
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

    def save(self, directory: str) -> dict[str, str]:
        """Write this rank's weights, moments, counts and generators; digests of each. OSError if it cannot be done."""
        return self.state.save(directory, self.counts)

    def load(self, directory: str) -> dict[str, str]:
        """Put back what `save` wrote, with any number of ranks and any ZeRO stage; digests of what can be compared.

        CheckpointError for what is damaged, of another model, or not after loading what it was. Draw nothing after.
        """
        fault("learner.load", self.rank)
        self.counts, digests = self.state.load(directory)
        return digests

    def close(self) -> None:
        """Let go of the model. The process group stays: it is the process's."""
        self.engine.destroy()


def _diagnosed(pi: PolicyOutput, x: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shares and maxima every algorithm has: counts, entropy, and how far sampler and learner are apart."""
    sampled, logp = x.mask(Origin.POLICY), pi.logp.detach()
    apart = logp - x.behavior_logp
    weight = apart.double().clamp(-kl.BOUND, kl.BOUND).exp()  # w = π/μ of a token
    metrics = {
        "tokens": x.mask(TRAINED).sum(),
        "entropy": x.mean(pi.entropy.detach(), Origin.POLICY),
        "mismatch/mean": x.mean(apart.abs(), Origin.POLICY),
        "mismatch/kl": x.mean(kl.k3(x.behavior_logp, logp), Origin.POLICY),  # of KL(μ ‖ π): the tokens are μ's
        "mismatch/weight": x.mean(weight, Origin.POLICY),
        "mismatch/weight_squared": x.mean(weight.square(), Origin.POLICY),
    }
    return metrics, {"mismatch/max": apart[sampled].abs().max()} if bool(sampled.any()) else {}


def _layer(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `model.layers.3`; a name without a number is a layer of its own."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _made_by_save(name: str) -> bool:
    return name in ("config.json", "README.md") or name.endswith(
        (".safetensors", ".bin", ".index.json", ".gguf", ".pt")
    )


__all__ = ["Place", "Rank", "RankOptions"]
