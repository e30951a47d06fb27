"""How fast this machine is, in seconds: products, memory, and a learner's layers of a model's own shape.

The learner's pass is measured as it is computed (engines/model.py: packed, prompts shared, the head in chunks), on one
and on three layers with random weights and on two sizes of micro-batch: four times, four unknowns (plan/seconds.py:
Learned). Nothing is downloaded, nothing is trained.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rlkd.core.batch import MicroBatch, Totals, microbatch
from rlkd.core.matmul import product
from rlkd.core.types import Origin, Sample
from rlkd.engines.model import ModelOptions, Policy

REPEATS = 3
FEW, MORE = 1, 3  # layers
ROWS, WIDTH, DEEP = 512, 1024, 2048  # of the product: 2.1 GFLOP
MOVED = 2**28  # bytes that are copied
LAYERED = ("layer_types", "max_window_layers", "dtype", "torch_dtype", "_name_or_path", "_model_name_or_path")


@dataclass(frozen=True)
class Batch:
    """Of the micro-batch that is measured: groups, samples of each, tokens of a prompt and of an answer."""

    groups: int
    samples: int
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.groups * (self.prompt + self.samples * self.answer)


def machine() -> dict[str, float]:
    """FLOP/s of float32 products and bytes/s of memory (read and written), with the threads that torch has now."""
    a, b = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, DEEP)
    product_s = _best(lambda: product(a, b), 10)
    source = torch.ones(MOVED // 4)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source), 5)
    return {"flops": 2 * ROWS * WIDTH * DEEP / product_s, "bandwidth": 2 * MOVED / copy_s}


def learner(content: Mapping[str, Any], batch: Batch, head_rows: int, checkpointing: bool) -> dict[str, float]:
    """The four numbers of a learner's pass for the model of this config.json; tokens are computed ones."""
    small = Batch(max(1, batch.groups // 4), batch.samples, batch.prompt, batch.answer)
    if small.groups == batch.groups:  # one group: half of its samples
        small = Batch(1, max(1, batch.samples // 2), batch.prompt, batch.answer)
    seconds = {}
    for layers in (FEW, MORE):
        policy = _policy(content, layers, head_rows, checkpointing)
        for size in (small, batch):
            x = _micro_batch(policy.vocabulary, size)
            seconds[layers, size] = _best(partial(_pass, policy, x), REPEATS)
        del policy
    layer = {size: max(0.0, (seconds[MORE, size] - seconds[FEW, size]) / (MORE - FEW)) for size in (small, batch)}
    rest = {size: max(0.0, seconds[FEW, size] - FEW * layer[size]) for size in (small, batch)}
    layer_s, token_layer_s = _line(small.tokens, layer[small], batch.tokens, layer[batch])
    micro_s, token_s = _line(small.tokens, rest[small], batch.tokens, rest[batch])
    return {"micro_s": micro_s, "layer_s": layer_s, "token_s": token_s, "token_layer_s": token_layer_s}


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """Intercept and slope, neither negative."""
    if x1 <= x0:
        return 0.0, y1 / max(x1, 1)
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    intercept = y1 - slope * x1
    return (intercept, slope) if intercept >= 0 else (0.0, y1 / x1)


def _policy(content: Mapping[str, Any], layers: int, head_rows: int, checkpointing: bool) -> Policy:
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {k: v for k, v in dict(content.get("text_config", content)).items() if k not in LAYERED}
    config = AutoConfig.for_model(text.pop("model_type"), **{**text, "num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    options = ModelOptions("", "float32", "cpu", head_rows=head_rows, gradient_checkpointing=checkpointing)
    return Policy.of(model, options)


def _micro_batch(vocabulary: int, size: Batch) -> MicroBatch:
    draw = np.random.default_rng(0)
    samples, groups = [], []
    for group in range(size.groups):
        prompt = draw.integers(0, vocabulary, size.prompt)
        for _ in range(size.samples):
            tokens = np.concatenate([prompt, draw.integers(0, vocabulary, size.answer)]).astype(np.int32)
            origin = np.repeat(np.array([Origin.PROMPT, Origin.POLICY], np.uint8), [size.prompt, size.answer])
            samples.append(Sample(tokens, origin, np.full(len(tokens), np.nan, np.float32), (0, 0)))
            groups.append(group)
    return microbatch(samples, groups, Totals.of(samples))


def _pass(policy: Policy, x: MicroBatch) -> None:
    out = policy.output(x)
    x.mean(out.logp + 0.0 * out.entropy, Origin.POLICY).backward()
    for p in policy.parameters():
        p.grad = None


def _best(work: Callable[[], Any], times: int) -> float:
    """Seconds of the quickest of so many, after one that warms up."""
    work()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def main() -> None:
    """As a process of its own, in the environment of a worker: asked on stdin, answered on stdout, in json."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    batch = Batch(**asked["batch"])
    found = {**machine(), **learner(asked["model"], batch, asked["head_rows"], asked["checkpointing"])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
