"""Seconds of one optimizer step, stage by stage, and of the step they make.

N parameters, L layers, T tokens, F FLOP/s, W bytes/s of memory. A token costs 2 FLOP a parameter forward and 4 backward
(Kaplan et al. 2020, arXiv:2001.08361, §2.1); attention 4·L·heads·head_dim·context forward. Decoding reads the weights
and all keys and values once a token of every sequence (Pope et al. 2022, arXiv:2211.05102, §3.1), or is bound by its
products, whichever takes longer on a GPU; on a CPU, which does not overlap the two, both (measured).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.config.schema import Config
from rlkd.plan.devices import devices
from rlkd.plan.hardware import Hardware
from rlkd.plan.memory import kv_room
from rlkd.plan.precision import weight_size, zero_stage
from rlkd.plan.shape import Shape
from rlkd.plan.work import Work

OPTIMIZER_BYTES = 28  # a parameter: weight, gradient, two moments read; weight and moments written; float32
HOST_BYTES_PER_S = 12.5e9  # of one rank that steps in the host's memory: a node's 100 GB/s by 8; assumed
TENSOR_S = 15e-6  # of one all-reduce of tensor-parallel decoding; assumed
# Weights through shared memory, with digests. On a CPU vLLM repacks them: 538 MB in 0.7 to 1.4 s on two cores. On a
# GPU: assumed, from hashing and copying alone.
SHM_BYTES_PER_S = {"cpu": 0.45e9, "gpu": 1.0e9}
DISK_BYTES_PER_S = 0.5e9  # the same through a shared disk, written and read; assumed
NODE_BYTES_PER_S = 1.0e9  # from the learner's node to another, through Ray's object store; assumed
SYNC_S = 0.02  # of a sync, whatever the model
TENSOR_LINK = 2.0  # bytes of an all-reduce that pass a link, for each byte that is reduced (a ring)


@dataclass(frozen=True)
class Learned:
    """A learner's forward and backward pass, measured here on a few layers of this very shape (engines/calibrate.py):
    seconds = micro_s + layers·layer_s + tokens·(token_s + layers·token_layer_s)."""

    micro_s: float
    layer_s: float
    token_s: float
    token_layer_s: float

    def seconds(self, micro_batches: int, tokens: float, layers: int) -> float:
        return micro_batches * (self.micro_s + layers * self.layer_s) + tokens * (
            self.token_s + layers * self.token_layer_s
        )


@dataclass(frozen=True)
class Step:
    """Seconds, and what they are good for."""

    rollout: float
    score: float
    learn: float
    sync: float
    step: float  # what passes between two optimizer steps: stages may overlap
    idle: Mapping[str, float]  # share of the step that the role waits; of roles on devices of their own
    bubbles: float  # share of all device seconds that nobody uses
    bound: str  # what the step's length follows from


def rollout_s(config: Config, shape: Shape, work: Work, hardware: Hardware, tail: bool = True) -> float:
    """All sequences of a step, by all rollout workers.

    With `tail` until the longest is done; without it (samples of the next steps fill the places) at a full batch.
    Lengths are taken as exponential around their mean: the longest of n is mean·(1 + ln n), cut at max_tokens.
    """
    if not work.sampled:
        return 0.0
    s, mean = config.sampler, max(work.lengths.answer, 1.0)
    mine = work.sequences / s.workers
    at_once = _at_once(config, shape, work, hardware, mine)
    longest = longest_answer(work, mine)
    steps = mine * mean / at_once + (longest - mean if tail else 0.0)
    return decode_s(config, shape, work, hardware, steps, mine * mean) + prefill_s(config, shape, work, hardware)


def _at_once(config: Config, shape: Shape, work: Work, hardware: Hardware, mine: float) -> float:
    if config.sampler.engine == "hf":
        return min(float(work.samples), mine)  # a group at a time
    room = max(1.0, kv_room(config, shape, work, hardware) * work.lengths.longest / (work.context + 1))
    return max(1.0, min(mine, float(config.sampler.max_num_seqs), room))


def longest_answer(work: Work, sequences: float) -> float:
    """Tokens of the longest of so many answers, on average."""
    mean = max(work.lengths.answer, 1.0)
    return min(float(work.lengths.longest_answer), mean * (1 + math.log(max(sequences, 1.0))))


def decode_s(config: Config, shape: Shape, work: Work, hardware: Hardware, steps: float, tokens: float) -> float:
    """So many decoding steps of one worker, which write so many tokens altogether."""
    h, t = hardware, config.sampler.tensor_parallel
    w, share = weight_size(config, h.gpu), _share_of_machine(config, h)
    moved = steps * w * (shape.trunk + shape.head) + tokens * work.context * shape.kv_bytes(w)
    moved_s = moved / t / (h.reach * h.bandwidth * share)
    product_s = 2 * (shape.trunk + shape.head) * tokens / t / (h.decode * h.flops * share)
    floor_s = steps * (h.floor_s + shape.layers * h.layer_s) + tokens * h.sequence_s
    tensor_s = steps * 2 * shape.layers * TENSOR_S if t > 1 else 0.0
    return (max(moved_s, product_s) if h.overlaps else moved_s + product_s) + floor_s + tensor_s


def prefill_s(config: Config, shape: Shape, work: Work, hardware: Hardware) -> float:
    h, s = hardware, config.sampler
    tokens = work.prefilled / s.workers
    flops = tokens * (2 * shape.trunk + _attention(shape, work.lengths.prompt / 2))
    return flops / (s.tensor_parallel * h.prefill * h.flops * _share_of_machine(config, h))


def _share_of_machine(config: Config, hardware: Hardware) -> float:
    """Of a CPU's cores and memory bandwidth, for one rollout worker (workers/threads.py)."""
    if hardware.gpu:
        return 1.0
    return (0.5 if config.schedule.staleness > 0 else 1.0) / config.sampler.workers


def learn_flops(config: Config, shape: Shape, work: Work) -> float:
    """Of a step, all ranks together. The head's logits are computed again in the backward pass (core/logprob.py)."""
    tokens, attention = work.computed, _attention(shape, work.context)
    trunk = (6 * shape.trunk + 3 * attention) * tokens
    again = (2 * shape.trunk + attention) * tokens if config.learner.gradient_checkpointing else 0.0
    return trunk + again + 8 * shape.head * work.written


def learn_s(config: Config, shape: Shape, work: Work, hardware: Hardware, learned: Learned | None = None) -> float:
    """Forward and backward of every micro-batch, what ranks say to each other, and the optimizer."""
    h, ranks = hardware, config.learner.ranks
    turns = micro_batches(config, work)
    if h.gpu:
        compute_s = learn_flops(config, shape, work) / (ranks * h.train * h.flops)
    else:
        share = 0.5 if config.schedule.staleness > 0 else 1.0
        if learned is not None:  # measured with all cores; ranks divide them, and their work
            compute_s = learned.seconds(turns * ranks, work.computed, shape.layers) / share
        else:
            compute_s = learn_flops(config, shape, work) / (h.train * h.flops * share)
    return compute_s + _between_ranks_s(config, shape, hardware, turns) + optimizer_s(config, shape, hardware)


def micro_batches(config: Config, work: Work) -> int:
    """Of one rank and step."""
    return max(1, math.ceil(work.computed / config.learner.ranks / config.learner.max_tokens))


def _between_ranks_s(config: Config, shape: Shape, hardware: Hardware, turns: int) -> float:
    """Gradients and weights over the slowest link, as rings (Thakur et al. 2005; ZeRO §7.1 for the volumes)."""
    ranks, n = config.learner.ranks, shape.parameters
    if ranks == 1:
        return 0.0
    w, stage = weight_size(config, hardware.gpu), zero_stage(config, hardware.gpu)
    link = hardware.link if ranks <= hardware.per_node or not hardware.gpu else hardware.network
    once = n * (ranks - 1) / ranks
    reduced = {0: 2 * w * once, 1: 2 * w * once, 2: w * once * turns, 3: w * once * turns}[stage]
    gathered = {0: 0.0, 1: w * once, 2: w * once, 3: 2 * w * once * turns}[stage]
    if stage >= 2 and not hardware.gpu:  # gloo has no reduce-scatter: DeepSpeed reduces whole buckets
        reduced *= TENSOR_LINK
    return (reduced + gathered) / link


def optimizer_s(config: Config, shape: Shape, hardware: Hardware) -> float:
    """AdamW is bound by memory: 28 bytes a parameter that the rank steps."""
    ranks, stage = config.learner.ranks, zero_stage(config, hardware.gpu)
    mine = shape.parameters / (1 if stage == 0 else ranks)
    if config.learner.offload:
        return OPTIMIZER_BYTES * mine / HOST_BYTES_PER_S
    together = 1 if hardware.gpu else ranks  # ranks of a CPU share its memory
    return OPTIMIZER_BYTES * mine * together / (hardware.reach * hardware.bandwidth)


def _attention(shape: Shape, context: float) -> float:
    """FLOP of a token's attention forward."""
    return 4 * shape.layers * shape.heads * shape.head_dim * context


def score_s(shape: Shape, work: Work, workers: int, hardware: Hardware) -> float:
    """A frozen model of this shape reads all of a step's sequences."""
    flops = work.computed * (2 * shape.trunk + _attention(shape, work.context)) + 2 * shape.head * work.written
    share = 1.0 if hardware.gpu else 0.5 / workers  # one thread a scorer, beside the samplers (workers/threads.py)
    return flops / (workers * hardware.prefill * hardware.flops * share)


def sync_s(config: Config, shape: Shape, hardware: Hardware) -> float:
    """From the learner's weights to those of every sampler."""
    size, kind = weight_size(config, hardware.gpu) * shape.parameters, config.sync.kind
    if kind == "disk":
        return SYNC_S + size / DISK_BYTES_PER_S
    elsewhere = kind == "ray" or (kind == "auto" and devices(config, hardware).nodes > 1)
    return SYNC_S + size / SHM_BYTES_PER_S[hardware.kind] + (size / NODE_BYTES_PER_S if elsewhere else 0.0)


def step(
    config: Config,
    shape: Shape,
    work: Work,
    hardware: Hardware,
    scored: Mapping[str, tuple[Shape, int]],
    learned: Learned | None = None,
) -> Step:
    """`scored`: of every frozen model that scores its shape and its workers.

    Synchronous: sample (score beside it, where scorers have devices of their own), learn, sync. With staleness η ≥ 1
    sampling and learning overlap, and the step is the longest of: learning and sync; sampling without a tail; the
    latency of a group divided by η + 1, for no group may be older (performance.md §2.2).
    """
    apart = hardware.gpu and not config.ray.share_gpus
    tail, full = (rollout_s(config, shape, work, hardware, t) for t in (True, False))
    scores = [score_s(s, work, n, hardware) for s, n in scored.values()]
    score = max(scores, default=0.0) if apart else sum(scores, 0.0)
    learn, sync = learn_s(config, shape, work, hardware, learned), sync_s(config, shape, hardware)
    stale = config.schedule.staleness
    if stale and (apart or not hardware.gpu):
        bounds = {
            "learning": learn + sync,
            "sampling": full if apart else full + score,
            "the longest answers": tail / (stale + 1),
            **({"scoring": score} if apart else {}),
        }
        whole = max(bounds.values())
        bound = max(bounds, key=lambda name: bounds[name])
    else:
        sampled = max(tail, score) if apart else tail + score
        whole, bound = sampled + learn + sync, "sampling" if sampled > learn + sync else "learning"
    busy = {"rollout": min(full, whole), "learner": min(learn, whole)}
    counts = {"rollout": config.sampler.workers * config.sampler.tensor_parallel, "learner": config.learner.ranks}
    for name, (s, n) in scored.items():
        busy[name], counts[name] = min(score_s(s, work, n, hardware), whole), n
    idle = {name: 1 - seconds / whole for name, seconds in busy.items()} if apart else {}
    if apart:
        used = sum(busy[name] * counts[name] for name in busy)
        bubbles = max(0.0, 1 - used / (whole * sum(counts.values())))
    else:
        bubbles = max(0.0, 1 - (sum(busy.values()) / whole)) if not stale else 0.0
    return Step(tail, score, learn, sync, whole, idle, bubbles, bound)


__all__ = ["Learned", "Step", "learn_s", "rollout_s", "score_s", "step", "sync_s"]
