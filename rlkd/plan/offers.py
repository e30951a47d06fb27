"""What would fit: settings to change, each tried by the same formulas that said it does not, and by the recipe's own
rules. What is offered fits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from rlkd.config import contradictions
from rlkd.core.errors import ConfigError
from rlkd.plan.devices import Changes, changed, splits
from rlkd.plan.hardware import Hardware
from rlkd.plan.plan import Plan, planned
from rlkd.plan.seconds import Learned
from rlkd.plan.work import Lengths

AT_ONCE = 4  # settings of one offer
SHOWN = 3
ROUND = 256  # tokens that limits are rounded up to
MOST_DEVICES = 1024


@dataclass(frozen=True)
class Offer:
    """Settings that make the recipe fit, and the plan with them."""

    changes: Changes
    plan: Plan

    def __str__(self) -> str:
        return " ".join(f"{key}={_shown(value)}" for key, value in self.changes.items())


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def offers(plan: Plan, lengths: Lengths, learned: Learned | None = None) -> list[Offer]:
    """At most three ways to make a plan fit that does not: the fewest settings on the same devices first, then the
    fewest devices; of each the fastest. Empty if nothing that is tried here fits."""
    moves = list(_moves(plan, lengths))
    found: list[Offer] = []
    for size in range(1, AT_ONCE + 1):
        tried = (c for c in combinations(moves, size) if len({key for key, _ in c}) == size)
        fitting = [o for c in tried if (o := _tried(plan, dict(c), lengths, learned)) is not None]
        found += fitting
        if any(o.plan.devices.total <= plan.devices.total for o in fitting) or (size > 2 and found):
            break
    ranked = sorted(found, key=lambda o: (o.plan.devices.total, len(o.changes), o.plan.step.step))
    few: dict[tuple[int, int], Offer] = {}
    for offer in ranked:
        few.setdefault((offer.plan.devices.total, len(offer.changes)), offer)
    return list(few.values())[:SHOWN]


def best(plan: Plan, gpus: int, lengths: Lengths, learned: Learned | None = None) -> Offer | None:
    """The fastest way to run the recipe on so many GPUs that fits; if none does as it is, with other settings too."""
    found = [o for c in splits(plan.config, gpus) if (o := _tried(plan, c, lengths, learned)) is not None]
    if found:
        return min(found, key=lambda o: o.plan.step.step)
    thin = [c for i, c in enumerate(splits(plan.config, gpus)) if i in _spread(gpus)]
    for size in range(1, AT_ONCE):
        for split in thin:
            base = planned(changed(plan.config, split), plan.models, plan.hardware, lengths, learned)
            moves = [m for m in _moves(base, lengths) if m[0] not in ("learner.ranks", "sampler.tensor_parallel")]
            for c in combinations(moves, size):
                if len({key for key, _ in c}) < size:
                    continue
                offer = _tried(plan, {**split, **dict(c)}, lengths, learned)
                if offer is not None and offer.plan.devices.total == gpus:
                    found.append(offer)
        if found:
            return min(found, key=lambda o: o.plan.step.step)
    return None


def _spread(gpus: int) -> set[int]:
    """Few of many splits: those that are tried together with other settings."""
    return {0, gpus // 8, gpus // 4, gpus // 3, gpus // 2}


def _tried(plan: Plan, changes: Changes, lengths: Lengths, learned: Learned | None) -> Offer | None:
    """The recipe with these settings, if it fits and says nothing that contradicts itself."""
    config = changed(plan.config, changes)
    new = planned(config, plan.models, plan.hardware, lengths, learned)
    return Offer(changes, new) if new.fits and not contradictions.findings(config) else None


def _moves(plan: Plan, lengths: Lengths) -> Iterator[tuple[str, object]]:
    """Single settings that need less memory of whoever has too little, the cheapest first."""
    roles = {shortage.role for shortage in plan.shortages}
    gpu, shared = plan.hardware.gpu, plan.config.ray.share_gpus
    if "learner" in roles or not gpu:
        yield from _learner_moves(plan, lengths)
    if "rollout" in roles or shared or not gpu:
        yield from _sampler_moves(plan, lengths)
    for role in roles - {"learner", "rollout"}:
        key = f"{role}.max_tokens" if role == "reference" else None
        if key and plan.config.reference.max_tokens > lengths.longest:
            yield key, _rounded(lengths.longest)
    if shared:
        yield "ray.share_gpus", False


def _learner_moves(plan: Plan, lengths: Lengths) -> Iterator[tuple[str, object]]:
    o = plan.config.learner
    least = _rounded(lengths.longest * (plan.work.samples if plan.config.algorithm.whole_groups else 1))
    for size in (o.max_tokens // 2, o.max_tokens // 4, least):
        if least <= size < o.max_tokens:
            yield "learner.max_tokens", size
    if not o.gradient_checkpointing:
        yield "learner.gradient_checkpointing", True
    stage = o.zero_stage if o.zero_stage is not None else (1 if o.ranks > 1 else 0)
    for higher in range(max(stage + 1, 2), 4):
        if o.ranks > 1 or plan.hardware.gpu:
            yield "learner.zero_stage", higher
    if not o.offload and plan.hardware.gpu:
        yield "learner.offload", True
    if plan.hardware.gpu:
        ranks = 2 ** math.ceil(math.log2(o.ranks + 1))
        while ranks <= min(MOST_DEVICES, plan.work.sequences):
            yield "learner.ranks", ranks
            ranks *= 2


def _sampler_moves(plan: Plan, lengths: Lengths) -> Iterator[tuple[str, object]]:
    s, shape = plan.config.sampler, plan.models.policy
    if not plan.hardware.gpu:
        for gib in (s.kv_cache_gib / 2, s.kv_cache_gib / 4):
            if s.engine == "vllm" and plan.kv_sequences * gib / s.kv_cache_gib >= 1:
                yield "sampler.kv_cache_gib", gib
        if s.workers > 1:
            yield "sampler.workers", s.workers // 2
        return
    context = plan.config.model.context or shape.context
    if _rounded(lengths.longest) < context:
        yield "model.context", _rounded(lengths.longest)
    for share in (0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        if share != s.gpu_memory_utilization and (share > s.gpu_memory_utilization or plan.config.ray.share_gpus):
            yield "sampler.gpu_memory_utilization", share
    tensors = 2 * s.tensor_parallel
    while tensors <= 16:
        if shape.heads % tensors == 0:
            yield "sampler.tensor_parallel", tensors
        tensors *= 2


def _rounded(tokens: int) -> int:
    return ROUND * math.ceil(tokens / ROUND)


def table(plan: Plan, counts: Sequence[int], lengths: Lengths) -> list[tuple[int, Offer | None]]:
    """The best way to use each of these numbers of GPUs; None where nothing fits."""
    return [(gpus, best(plan, gpus, lengths)) for gpus in counts]


def wanted(gpus: int, hardware: Hardware) -> None:
    """ConfigError for a number of GPUs that no plan is made of."""
    if not hardware.gpu:
        fix = f"--hardware with one of the GPUs, or no --gpus: a plan on {hardware.name} is of this machine"
        raise ConfigError("RLKD-C431", f"--gpus {gpus} with --hardware {hardware.name}", "command line", fix)
    if not 1 <= gpus <= MOST_DEVICES:
        raise ConfigError("RLKD-C431", f"--gpus {gpus}", "command line", f"1 to {MOST_DEVICES}")


__all__ = ["Offer", "best", "offers", "table", "wanted"]
