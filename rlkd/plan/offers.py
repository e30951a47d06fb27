"""What would fit: settings to change, each tried by the same formulas that said it does not, and by the recipe's own
rules. What is offered fits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from rlkd.config import contradictions
from rlkd.core.errors import ConfigError
from rlkd.plan.devices import Changes, changed, splits
from rlkd.plan.hardware import Hardware
from rlkd.plan.plan import Plan, fits, planned
from rlkd.plan.precision import weight_size
from rlkd.plan.seconds import Learned
from rlkd.plan.work import Lengths

AT_ONCE = 4  # settings of one offer
ROUND = 256  # tokens that limits are rounded up to
MOST_DEVICES = 1024
MOST_TENSORS = 8
COUNTS = ("learner.ranks", "sampler.tensor_parallel", "ray.share_gpus")  # settings that a split of the devices has made


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
    """At most three ways to make a plan fit that does not: the one with the fewest devices, the one with the fewest
    settings, and the fastest with at most twice the fewest devices. Empty if nothing that is tried here fits."""
    found: list[Offer] = []
    for size in range(1, AT_ONCE + 1):
        found += _fitting(plan, None, plan, size, lengths, learned)
        if any(o.plan.devices.total <= plan.devices.total for o in found) or (size > 2 and found):
            break
    if not found:
        return []
    fewest = min(found, key=lambda o: (o.plan.devices.total, o.plan.step.step))
    simplest = min(found, key=lambda o: (len(o.changes), o.plan.devices.total, o.plan.step.step))
    near = [o for o in found if o.plan.devices.total <= 2 * fewest.plan.devices.total]
    fastest = min(near, key=lambda o: o.plan.step.step)
    return list({str(o): o for o in (fewest, simplest, fastest)}.values())


def best(plan: Plan, gpus: int, lengths: Lengths, learned: Learned | None = None) -> Offer | None:
    """The fastest way to run the recipe on so many GPUs that fits; if none does as it is, with other settings too."""
    ways = list(splits(plan.config, gpus, _tensors(plan)))
    found = [o for c in ways if (o := _tried(plan, c, lengths, learned)) is not None]
    if found:
        return min(found, key=lambda o: o.plan.step.step)
    places = {0, len(ways) // 4, len(ways) // 2, 3 * len(ways) // 4, len(ways) - 1} if ways else set()
    few = [ways[i] for i in sorted(places)]
    for size in range(1, AT_ONCE):
        for split in few:
            base = planned(changed(plan.config, split), plan.models, plan.hardware, lengths, learned)
            found += _fitting(plan, split, base, size, lengths, learned)
        if found:
            return min(found, key=lambda o: o.plan.step.step)
    return None


def _fitting(
    plan: Plan, split: Changes | None, base: Plan, size: int, lengths: Lengths, learned: Learned | None
) -> Iterator[Offer]:
    """The plan with so many other settings, on top of a split of the devices (the plan `base`), where that fits. Where
    not even the strongest values of some settings fit, weaker ones are not tried."""
    moves: dict[str, list[object]] = {}
    for key, value in _moves(base, lengths):
        if split is None or key not in COUNTS:
            moves.setdefault(key, []).append(value)
    for keys in combinations(moves, size):
        strongest = {**(split or {}), **{key: moves[key][-1] for key in keys}}
        either_way = "sampler.gpu_memory_utilization" in keys and base.config.ray.share_gpus
        if not either_way and not fits(changed(plan.config, strongest), plan.models, plan.hardware, lengths):
            continue
        for values in product(*(moves[key] for key in keys)):
            offer = _tried(plan, {**(split or {}), **dict(zip(keys, values, strict=True))}, lengths, learned)
            if offer is not None:
                yield offer


def _tensors(plan: Plan) -> int:
    """The recipe's tensor_parallel, or the smallest with which the weights leave half of a device."""
    tensors, shape = plan.config.sampler.tensor_parallel, plan.models.policy
    size = weight_size(plan.config, plan.hardware.gpu) * shape.parameters
    while size / tensors > plan.hardware.memory / 2 and tensors < MOST_TENSORS and shape.heads % (2 * tensors) == 0:
        tensors *= 2
    return tensors


def _tried(plan: Plan, changes: Changes, lengths: Lengths, learned: Learned | None) -> Offer | None:
    """The recipe with these settings, if it fits and says nothing that contradicts itself."""
    config = changed(plan.config, changes)
    if not fits(config, plan.models, plan.hardware, lengths) or contradictions.findings(config):
        return None
    return Offer(changes, planned(config, plan.models, plan.hardware, lengths, learned))


def _moves(plan: Plan, lengths: Lengths) -> Iterator[tuple[str, object]]:
    """Single settings that need less memory of whoever has too little; of each setting the strongest value last."""
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
    while tensors <= MOST_TENSORS:
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
