"""Memory of one process of each role, in bytes by part.

N parameters, R ranks, w bytes of a weight (2 bfloat16, 4 float32). Model states as Rajbhandari et al. 2020
(ZeRO, arXiv:1910.02054, §3.1 and Figure 1): with Adam K = 12 bytes a parameter of float32 weight and two moments; stage
1 divides these by R, stage 2 the gradients too, stage 3 the weights too. What differs from the paper was read in
DeepSpeed 0.19.8, and is said below. Activations are counted tensor by tensor (`activations`), as Korthikanti et al.
2022 (arXiv:2205.05198, §4.1) count them for GPT, here for a gated decoder in transformers' eager form.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.config.schema import Config
from rlkd.plan.hardware import GIB, Hardware
from rlkd.plan.precision import weight_size, zero_stage
from rlkd.plan.shape import Shape
from rlkd.plan.work import Work

BUCKET = 50_000_000  # elements of DeepSpeed's gradient bucket (engines/learner_setup.py)
CHUNK_LOGITS = 2**22  # logits held at once whatever the number of rows (core/logprob.py)
PADDING = 1.15  # of attention's padded blocks (engines/attention.py: at most a quarter)
# What a process holds before it has a model; measured on a CPU, see benchmarks/results/plan.md.
BASE = {"learner": 0.75 * GIB, "vllm": 0.75 * GIB, "hf": 0.6 * GIB, "scorer": 0.6 * GIB}
CUDA = 1.2 * GIB  # context, NCCL's buffers; assumed
FRAGMENTS = 0.05  # of what torch's allocator holds on a GPU; assumed


@dataclass(frozen=True)
class Memory:
    """What one process needs. `host` is beside a GPU's memory; on a CPU everything is in `parts`."""

    role: str
    parts: Mapping[str, float]
    host: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values(), 0.0)

    @property
    def host_total(self) -> float:
        return sum(self.host.values(), 0.0)


def activations(shape: Shape, element: int, checkpointing: bool, flash: bool) -> float:
    """Bytes that a token keeps for the backward pass.

    A layer keeps, in elements: two residual streams and, of each norm, what it normalized and its output (6h; of
    bfloat16 the norms' float32 copies too: 4h more); rotated queries, attention's output twice (as SDPA's result and as
    the next product's input), keys and values; gate, up, silu(gate) and their product (4i). Checkpointing (Chen et al.
    2016) keeps one residual stream a layer, and all of the layer under way.
    """
    h, i = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    padded = 1.0 if flash else PADDING
    norms = (6 + (4 if element == 2 else 0)) * h
    attention = 2 * padded * queries + queries + 2 * padded * keys
    layer = (norms + attention + 4 * i) * element
    kept = h * element * shape.layers + layer if checkpointing else layer * shape.layers
    return float(kept + 3 * h * element)  # the last norm, and the states that the head reads


def head(shape: Shape, rows: float, head_rows: int, element: int) -> float:
    """Bytes of log-probs at their peak, the backward pass: three chunks of float32 logits, the states' gradient, and
    the head's own gradient in float32 with the product that is added to it (core/logprob.py)."""
    chunk = min(float(max(head_rows, CHUNK_LOGITS // shape.vocabulary)), max(rows, 1.0))
    copy = shape.head * 4 if element == 2 else 0  # a bfloat16 gradient is converted in the end
    return 3 * chunk * shape.vocabulary * 4 + 2 * rows * shape.hidden * 4 + 2 * shape.head * 4 + copy


def learner(config: Config, shape: Shape, work: Work, hardware: Hardware) -> Memory:
    """Of one rank."""
    o, ranks = config.learner, config.learner.ranks
    w, stage = weight_size(config, hardware.gpu), zero_stage(config, hardware.gpu)
    parts, host = _states(shape, w, stage, ranks, o.offload)
    tokens = micro_batch(config, work)
    flash = hardware.gpu and config.model.attention != "sdpa"
    parts["activations"] = tokens * activations(shape, w, o.gradient_checkpointing, flash)
    parts["log-probs"] = head(shape, tokens, o.head_rows, w)
    moved = _stepping(shape, w, stage, ranks)
    if hardware.gpu:  # the step comes when activations are gone: only what is beyond them counts
        parts["optimizer step"] = max(0.0, max(moved) - parts["activations"] - parts["log-probs"])
        parts["fragments"] = FRAGMENTS * sum(parts.values())
        parts["runtime"] = CUDA
        host["process"] = BASE["learner"]
    else:  # what was freed before is kept (workers/threads.py), in holes too small for these
        parts["optimizer step"] = sum(moved)
        parts["process"] = BASE["learner"]
        if ranks > 1 and stage:
            parts["collectives"] = _collectives(shape, w, stage)
    return Memory("learner", parts, host)


def _stepping(shape: Shape, w: int, stage: int, ranks: int) -> tuple[float, float]:
    """What ZeRO's step makes for a moment: the gradient in one piece (1 and 2, of float32 weights), and, for the norm,
    the largest tensor of it in float64."""
    if stage == 0:
        return 0.0, 0.0
    share = shape.parameters / ranks
    largest = max(shape.head, shape.hidden * shape.intermediate)
    return (4 * share if stage < 3 and w == 4 else 0.0), 8 * min(float(largest), share)


def _collectives(shape: Shape, w: int, stage: int) -> float:
    """What gloo copies on a CPU: ZeRO-1 and 2 gather all weights through one flat tensor, 2 and 3 reduce a bucket in
    another."""
    gathered = float(w * shape.parameters) if stage < 3 else 0.0
    return gathered + (min(float(BUCKET), float(shape.parameters)) * w if stage >= 2 else 0.0)


def _states(shape: Shape, w: int, stage: int, ranks: int, offload: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Weights, gradients, float32 copy and moments on the device; and in the host's memory.

    Read in DeepSpeed 0.19.8. ZeRO-1 with bfloat16 is BF16_Optimizer: gradients stay whole, in bfloat16 and summed in
    float32. ZeRO-2 sums the rank's part in float32 and has a bucket. ZeRO-3 gathers the largest layer, and the next.
    Offloading moves copy, moments and the summed gradients to the host.
    """
    n = float(shape.parameters)
    share = n / ranks
    bucket = min(float(BUCKET), n) * w
    weights = {0: w * n, 1: w * n, 2: w * n, 3: w * share + 2 * w * shape.largest_layer}[stage]
    whole = (w + 4) * n if w == 2 else w * n
    gradients = {0: w * n, 1: whole, 2: 4 * share + bucket, 3: 4 * share + bucket}[stage]
    copy, moments = (0.0 if stage == 0 else 4 * share), (8 * n if stage == 0 else 8 * share)
    device = {"weights": weights, "gradients": gradients}
    if not offload:
        return {**device, "float32 copy": copy, "moments": moments}, {}
    device["gradients"] = bucket if stage >= 2 else w * n
    return device, {"float32 copy": copy, "moments": moments, "gradients": 4 * share}


def micro_batch(config: Config, work: Work) -> float:
    """Computed tokens of the largest micro-batch: learner.max_tokens, or all a rank has to do."""
    return min(
        float(config.learner.max_tokens), max(work.most_computed / config.learner.ranks, float(work.lengths.longest))
    )


def sampler(config: Config, shape: Shape, work: Work, hardware: Hardware) -> Memory:
    """Of one rollout worker's device. On a GPU vLLM takes `gpu_memory_utilization` of it: what is left beside the
    weights is for keys and values (`kv_room`)."""
    s, w = config.sampler, weight_size(config, hardware.gpu)
    weights = w * shape.parameters / s.tensor_parallel
    if hardware.gpu and s.engine == "vllm":
        taken = s.gpu_memory_utilization * hardware.memory
        rest = _around_sampler(shape, w)
        parts = {"weights": weights, "runtime": rest, "keys and values": max(0.0, taken - weights - rest)}
        return Memory("rollout", parts, {"process": BASE["vllm"]})
    kv = s.kv_cache_gib * GIB if s.engine == "vllm" else float(work.samples * work.lengths.longest * shape.kv_bytes(w))
    logits = min(s.max_num_seqs, work.sequences) * shape.vocabulary * 4 * 3
    parts = {"weights": weights, "keys and values": kv, "logits": float(logits)}
    if hardware.gpu:
        return Memory("rollout", {**parts, "runtime": CUDA}, {"process": BASE[s.engine]})
    # a published version is mapped while it is loaded; vLLM keeps packed weights, and makes new ones meanwhile
    parts["version that is loaded"] = weights
    if s.engine == "vllm":
        parts["packing"] = weights
    return Memory("rollout", {**parts, "process": BASE[s.engine]}, {})


def _around_sampler(shape: Shape, w: int) -> float:
    """vLLM's own: context, graphs, the activations and logits of one profiling run. Assumed but for the logits."""
    return CUDA + 2048 * (10 * shape.hidden + 3 * shape.intermediate) * w + 256 * shape.vocabulary * 4 * 3.0


def kv_room(config: Config, shape: Shape, work: Work, hardware: Hardware) -> float:
    """Sequences of the longest length that one rollout worker's keys and values hold at once."""
    memory = sampler(config, shape, work, hardware).parts["keys and values"]
    w, tensors = weight_size(config, hardware.gpu), config.sampler.tensor_parallel
    per_token = shape.kv_bytes(w) / min(tensors, shape.kv_heads)
    return memory / (per_token * work.lengths.longest)


def scorer(config: Config, shape: Shape, tokens: int, head_rows: int, hardware: Hardware) -> Memory:
    """Of one worker of a frozen model that scores: no gradients, a layer's activations at a time."""
    w = weight_size(config, hardware.gpu)
    layer = (4 * shape.hidden + 3 * shape.heads * shape.head_dim + 3 * shape.intermediate) * w
    chunk = max(head_rows, CHUNK_LOGITS // shape.vocabulary) * shape.vocabulary * 4 * 2
    parts = {"weights": float(w * shape.parameters), "activations": float(tokens * layer), "log-probs": float(chunk)}
    if hardware.gpu:
        return Memory("scorer", {**parts, "runtime": CUDA}, {"process": BASE["scorer"]})
    return Memory("scorer", {**parts, "process": BASE["scorer"]}, {})


def writer(config: Config, shape: Shape, name: str, hardware: Hardware) -> Memory:
    """Of one worker of the teacher `name` that writes text."""
    wanted, w = config.teachers[name].writer, weight_size(config, hardware.gpu)
    weights = float(w * shape.parameters)
    if hardware.gpu:
        room = wanted.gpu_memory_utilization * hardware.memory - weights - CUDA
        parts = {"weights": weights, "runtime": CUDA, "keys and values": max(0.0, room)}
        return Memory("writer", parts, {"process": BASE[wanted.engine]})
    kv = wanted.kv_cache_gib * GIB if wanted.engine == "vllm" else float(wanted.max_tokens * shape.kv_bytes(w))
    return Memory("writer", {"weights": weights, "keys and values": kv, "process": BASE[wanted.engine]}, {})


def published(config: Config, shape: Shape, hardware: Hardware) -> float:
    """Bytes of the two versions of the weights that lie in shared memory or on the shared disk."""
    return 2.0 * weight_size(config, hardware.gpu) * shape.parameters


def learner_host(config: Config, shape: Shape, work: Work, hardware: Hardware) -> tuple[float, float]:
    """Bytes of a node's own memory: for each learner rank on it, and for the node. The published weights lie there, and
    under ZeRO-3 rank 0 holds all weights once more while it exports them."""
    one = learner(config, shape, work, hardware)
    whole = weight_size(config, hardware.gpu) * shape.parameters if zero_stage(config, hardware.gpu) == 3 else 0.0
    return one.host_total if hardware.gpu else one.total, published(config, shape, hardware) + whole
