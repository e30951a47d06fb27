"""Tokens a second of teacher scoring (B7): rlkd's packed forward against vLLM's prompt_logprobs and transformers.

    python -m benchmarks.teacher_scoring MODEL [--rounds N]

Each runs in a process of its own with the same number of threads; in each round one after the other scores the same new
groups (so none has them cached) while the others wait. Said are the medians, the medians of the rounds' ratios, and how
far the scorer is from the others in nats. A token that several sequences share counts for each of them.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "teacher_scoring.md"
PROMPT, ANSWER, SAMPLES, GROUPS = 128, 128, 8, 4  # tokens, tokens, per group, groups a round


def scorer(model: str, threads: int) -> Callable[[Any], Any]:
    from rlkd.engines.scorer import Scorer

    made = Scorer.create(path=model, dtype="float32", device="cpu", threads=threads)
    made.start()
    return made.logp


def vllm(model: str, threads: int) -> Callable[[Any], Any]:
    from rlkd.engines.vllm import VLLMEngine

    made = VLLMEngine.create(
        path=model, dtype="float32", device="cpu", threads=threads, context=512, kv_cache_gib=1.0, max_num_seqs=32
    )
    made.start()
    return made.logp


def padded(model: str, threads: int) -> Callable[[Any], Any]:
    """A group at a time, side by side, whole logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    made: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    async def logp(group: list[np.ndarray]) -> list[np.ndarray]:
        ids = torch.from_numpy(np.stack(group).astype(np.int64))  # all of one length: nothing is padded here
        with torch.inference_mode():
            logits = made(ids).logits[:, :-1]
            chosen = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(2)
        return [np.concatenate([[np.float32(np.nan)], row]) for row in chosen.numpy()]

    return logp


def serve(way: Connection, kind: str, model: str, threads: int) -> None:
    """A child: scores what it is sent, and says the numbers and the seconds."""
    logp = {"scorer": scorer, "vllm": vllm, "padded": padded}[kind](model, threads)

    async def all_groups(groups: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        return list(await asyncio.gather(*(logp(g) for g in groups)))

    with asyncio.Runner() as runner:
        while (groups := way.recv()) is not None:
            began = time.perf_counter()
            scored = runner.run(all_groups(groups))
            way.send((time.perf_counter() - began, scored))


def drawn(seed: int) -> list[list[np.ndarray]]:
    draw = np.random.default_rng(seed)
    groups = []
    for _ in range(GROUPS):
        prompt = draw.integers(10, 1000, PROMPT)
        answers = [draw.integers(10, 1000, ANSWER) for _ in range(SAMPLES)]
        groups.append([np.concatenate([prompt, a]).astype(np.int32) for a in answers])
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    context, ways, children = get_context("spawn"), {}, []
    for kind in ("scorer", "vllm", "padded"):
        ways[kind], theirs = context.Pipe()
        children.append(context.Process(target=serve, args=(theirs, kind, options.model, options.threads)))
        children[-1].start()
    load = os.getloadavg()[0]
    tokens = GROUPS * SAMPLES * (PROMPT + ANSWER)
    rates: dict[str, list[float]] = {kind: [] for kind in ways}
    apart = 0.0
    for number in range(-1, options.rounds):  # the first one warms up
        scored = {}
        for kind, way in ways.items():
            way.send(drawn(number + 1))
            seconds, scored[kind] = way.recv()
            if number >= 0:
                rates[kind].append(tokens / seconds)
        for other in ("vllm", "padded"):
            pairs = zip(scored["scorer"], scored[other], strict=True)
            apart = max(apart, *(float(np.nanmax(np.abs(a - b))) for g, h in pairs for a, b in zip(g, h, strict=True)))
    for way in ways.values():
        way.send(None)
    for child in children:
        child.join(30)
    median = {kind: statistics.median(found) for kind, found in rates.items()}
    ratio = {
        kind: statistics.median(a / b for a, b in zip(rates["scorer"], rates[kind], strict=True)) for kind in rates
    }
    text = f"""# Scoring by a teacher: the packed forward and vLLM

`python -m benchmarks.teacher_scoring MODEL`: {Path(options.model).name}, float32, {options.threads} threads, CPU; \
{GROUPS} groups of {SAMPLES} answers of {ANSWER} tokens to a prompt of {PROMPT}, {options.rounds} rounds, \
one after the other. Load of the machine before: {load:.1f}.

| scorer | tokens/s, median | lowest | highest |
|---|---|---|---|
| packed forward, prompt computed once (`engines/scorer.py`) | {median["scorer"]:,.0f} | {min(rates["scorer"]):,.0f} | \
{max(rates["scorer"]):,.0f} |
| vLLM, `prompt_logprobs` (`engines/vllm.py`) | {median["vllm"]:,.0f} | {min(rates["vllm"]):,.0f} | \
{max(rates["vllm"]):,.0f} |
| transformers, side by side, whole logits | {median["padded"]:,.0f} | {min(rates["padded"]):,.0f} | \
{max(rates["padded"]):,.0f} |

Medians of the rounds' ratios: the packed forward is {ratio["vllm"]:.2f} × as fast as vLLM and {ratio["padded"]:.2f} × \
as transformers. It is at most {apart:.1e} nats from either. All answers are of one length: nothing is lost to padding.
On a machine with other work (load above the number of cores) only the ratio says something.
"""
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
