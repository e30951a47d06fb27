"""What the tests of several learner ranks run in each process, and an algorithm that goes wrong on purpose."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import MicroBatch, pack
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.types import Origin
from rlkd.engines.deepspeed import Place, Rank, RankOptions
from rlkd.engines.model import ModelOptions
from tests.learner_help import random_groups

STEPS = 5
BUDGETS = (60, 24, 200, 30, 45)  # tokens of a micro-batch: their number differs from step to step
ALGORITHM = GRPO(norm="token", entropy=0.001)


@dataclass(frozen=True)
class Poisoned(GRPO):
    """GRPO whose loss or gradient is not finite from the given knob on."""

    name: str = "poisoned"
    what: str = field(default="loss")  # loss, gradient, or constant: a loss that is not finite with a gradient that is

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        good = super().loss(pi, x, knobs)
        if not knobs.get("poison"):
            return good
        if self.what == "loss":
            return replace(good, value=good.value * torch.nan)
        if self.what == "constant":
            return replace(good, value=good.value + torch.nan)
        zero = x.mean(pi.logp, Origin.POLICY) * 0.0
        return replace(good, value=good.value + zero.sqrt())  # 0, with the gradient ∞·0


def batches(ranks: int) -> list[list[list[MicroBatch]]]:
    """[step][turn][rank]: the same groups for any number of ranks."""
    groups = [[ALGORITHM.credit(g) for g in random_groups(100 + step, 4, 4)] for step in range(STEPS)]
    return [pack(g, ranks, budget) for g, budget in zip(groups, BUDGETS, strict=True)]


def options(folder: Path, stage: int | None, **changes: Any) -> RankOptions:
    return RankOptions(
        model=ModelOptions(str(folder), dtype=changes.pop("dtype", "float32"), device="cpu"),
        **{"steps": STEPS, "lr": 3e-3, "warmup_steps": 2, "lr_schedule": "cosine", "zero_stage": stage, "threads": 1,
           "timeout_s": 60.0, "weight_decay": 0.01, **changes},
    )  # fmt: skip


def run(rank: Rank, steps: Sequence[int], column: int = 0, ranks: int = 1) -> list[Any]:
    made = batches(ranks)
    return [rank.update([turn[column] for turn in made[step]], {}) for step in steps]


def weights(rank: Rank) -> dict[str, Tensor]:
    return {name: w.clone() for name, w in rank.weights()}


def in_processes(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(place, *arguments)` in `ranks` processes that meet through a file."""
    mp.spawn(_enter, (ranks, work, arguments), nprocs=ranks)  # type: ignore[no-untyped-call]


def _enter(index: int, ranks: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(arguments[0] / "rendezvous"), ranks)
    work(Place(index, ranks, store), *arguments)


def train_save_load(place: Place, scratch: Path, folder: Path) -> None:
    """Each ZeRO stage: 5 steps with a checkpoint after 3; then the checkpoint's last 2 steps in a new engine."""
    for stage in (0, 1, 2, 3):
        directory = str(scratch / f"checkpoint-{stage}")
        rank = Rank(ALGORITHM, options(folder, stage), place)
        shares = run(rank, range(3), place.rank, place.ranks)
        rank.save(directory)
        shares += run(rank, range(3, STEPS), place.rank, place.ranks)
        through = weights(rank)
        rank.export(str(scratch / f"hf-{stage}"))
        probe = rank.probe()
        rank.close()
        again = Rank(ALGORITHM, options(folder, stage), place)
        again.load(directory)
        resumed_at = again.step
        run(again, range(resumed_at, STEPS), place.rank, place.ranks)
        result = {"through": through, "resumed": weights(again), "resumed_at": resumed_at, "probe": probe,
                  "sums": [s.sums for s in shares], "maxima": [s.maxima for s in shares]}  # fmt: skip
        torch.save(result, scratch / f"stage-{stage}-rank-{place.rank}.pt")
        again.close()


def poisoned_on_one_rank(place: Place, scratch: Path, folder: Path) -> None:
    """A gradient that is not finite on rank 1 only: no rank moves."""
    from rlkd.core.errors import DivergedError

    for stage in (0, 1, 2, 3):
        rank = Rank(Poisoned(what="gradient"), options(folder, stage), place)
        run(rank, [0], place.rank, place.ranks)
        before = digests(rank, scratch / f"before-{stage}")
        mine = [turn[place.rank] for turn in batches(place.ranks)[1]]
        raised = ""
        try:
            rank.update(mine, {"poison": float(place.rank == 1)})
        except DivergedError as error:
            raised = str(error)
        same = before == digests(rank, scratch / f"after-{stage}")
        torch.save({"raised": raised, "same": same, "step": rank.step}, scratch / f"stage-{stage}-rank-{place.rank}.pt")
        rank.close()


def digests(rank: Rank, directory: Path) -> dict[str, str]:
    """Of weights and of what the optimizer keeps."""
    found = rank.save(str(directory))
    return {name: found[name] for name in ("weights", "optimizer")}


def skipped_on_one_rank(place: Place, scratch: Path, folder: Path) -> None:
    """A loss or gradient of rank 1 alone is not finite in the second of three steps: all ranks leave it out."""
    for stage in (0, 2, 3):
        quiet = Rank(Poisoned(), options(folder, stage), place)
        run(quiet, [0, 2], place.rank, place.ranks)
        expected = digests(quiet, scratch / f"quiet-{stage}")
        quiet.close()
        for what in ("loss", "gradient", "constant"):
            made = options(folder, stage, on_nonfinite="skip", debug_directory=str(scratch / "debug"))
            rank = Rank(Poisoned(what=what), made, place)
            counted = []
            for step in (0, 1, 2):
                mine = [turn[place.rank] for turn in batches(place.ranks)[step]]
                shares = rank.update(mine, {"poison": float(place.rank == 1 and step == 1)})
                counted.append(shares.maxima["nonfinite"])
            found = digests(rank, scratch / f"{what}-{stage}")
            result = {"counted": counted, "same": found == expected, "step": rank.step}
            torch.save(result, scratch / f"{what}-{stage}-rank-{place.rank}.pt")
            rank.close()


# --- with another number of ranks


def load_and_go_on(place: Place, scratch: Path, folder: Path, saved: Path) -> None:
    """Each ZeRO stage of a one-rank run on these ranks, loaded into the next stage: the last steps."""
    for stage in (0, 1, 2, 3):
        rank = Rank(ALGORITHM, options(folder, (stage + 1) % 4), place)
        compared = sorted(rank.load(str(saved / f"checkpoint-{stage}")))
        loaded = weights(rank)
        run(rank, range(3, STEPS), place.rank, place.ranks)
        result = {"loaded": loaded, "end": weights(rank), "compared": compared, "draw": torch.rand(2)}
        torch.save(result, scratch / f"on-{stage}-rank-{place.rank}.pt")
        rank.close()


# --- bit by bit


def with_dropout(rank: Rank) -> Rank:
    """Something in the model that draws (the policy itself has no dropout: the sampler has none)."""

    def drop(*given: Any) -> Tensor:  # module, its inputs, its output
        return torch.nn.functional.dropout(given[-1], 0.2)

    for layer in rank.policy.model.base_model.layers:
        layer.mlp.register_forward_hook(drop)
    return rank


Job = tuple[list[int], str, str, str]  # steps, state to load or "", state to save or "", name of what comes of it


def train_jobs(place: Place, scratch: Path, folder: Path, stage: int, jobs: Sequence[Job]) -> None:
    """Steps with dropout, each job in a new engine. A `load` ending in `!` forgets the generators."""
    for steps, load, save, name in jobs:
        rank = with_dropout(Rank(ALGORITHM, options(folder, stage, deterministic=True), place))
        if load:
            rank.load(str(scratch / load.removesuffix("!")))
        if load.endswith("!"):
            torch.manual_seed(1)
        shares = run(rank, steps, place.rank, place.ranks)
        if save:
            rank.save(str(scratch / save))
        found = {
            "losses": [s.sums["loss"] for s in shares],
            "norms": [s.maxima["grad_norm"] for s in shares],
            "weights": weights(rank),
        }
        torch.save(found, scratch / f"{name}-{place.rank}.pt")
        rank.close()


def struck(place: Place, scratch: Path, folder: Path, point: str) -> None:
    """Rank 1 is killed at a fault point."""
    os.environ["RLKD_FAULT"] = f"{point}@1=kill"
    rank = Rank(ALGORITHM, options(folder, 1), place)
    try:
        run(rank, [0], place.rank, place.ranks)
        rank.save(str(scratch / "state"))
        rank.load(str(scratch / "state"))
    finally:
        if place.rank == 0:
            time.sleep(60)  # mp.spawn tells of whoever ends first, and ends the others: that is to be rank 1
