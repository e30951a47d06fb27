"""Seconds and memory of the log-prob head, forward and backward (B5): whole logits, TRL's chunks, rlkd's chunks.

    python -m benchmarks.head [--rounds 2] [--trl-python .venv-trl/bin/python]

T hidden states, a vocabulary of V; the sizes are those of SmolLM2-135M (49k) and Qwen2.5-0.5B (152k). Every form is in
a process of its own, for every size a new one: memory is what its first call held beyond its inputs. Whole logits of
more than 1 GiB are not tried. Without `--trl-python` TRL's function is left out, and that is said.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learner import site_of, trl_head
from benchmarks.measure import MIB, about, children, extra_bytes, ratio, seconds, written

SIZES = [(512, 49_152, 576), (1024, 49_152, 576), (4096, 49_152, 576), (512, 151_936, 896), (1024, 151_936, 896)]
LARGEST = 2**30  # bytes of whole logits that are tried
FORMS = {"naive": "whole logits", "trl": "TRL's chunks", "rlkd": "rlkd's chunks (core/logprob.py)"}

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


def ours() -> Head:
    from rlkd.core.logprob import Head as Settings
    from rlkd.core.logprob import token_logp

    return lambda hidden, weight, targets: token_logp(hidden, weight, None, targets, Settings())[0]


def side(form: str, size: tuple[int, int, int], trl: str | None) -> Callable[[Any], dict[str, float]]:
    """The first piece of work gives memory and the gradients' norm, the others seconds."""
    head = {"naive": lambda: naive, "trl": lambda: trl_head(str(trl)), "rlkd": ours}[form]()
    rows, vocabulary, width = size
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))

    def both() -> None:
        hidden.grad = weight.grad = None
        head(hidden, weight, targets).mean().backward()

    def work(first: bool) -> dict[str, float]:
        if not first:
            return {"seconds": seconds(both)}
        extra = extra_bytes(both)
        assert hidden.grad is not None
        assert weight.grad is not None
        return {"extra": extra, "norm": float(hidden.grad.norm()), "weight_norm": float(weight.grad.norm())}

    return work


def measured(size: tuple[int, int, int], rounds: int, threads: int, trl: str | None) -> list[str]:
    """Rows of the table for a size."""
    rows, vocabulary, width = size
    forms = [f for f in FORMS if (f != "trl" or trl) and (f != "naive" or rows * vocabulary * 4 <= LARGEST)]
    with children({f: partial(side, f, size, trl) for f in forms}, threads) as sides:
        first = {f: sides[f](True) for f in forms}
        taken: dict[str, list[float]] = {f: [] for f in forms}
        for _ in range(rounds):
            for f in forms:
                taken[f].append(sides[f](False)["seconds"])
    for f in forms:  # the same sums, or the seconds mean nothing
        for norm in ("norm", "weight_norm"):
            assert abs(first[f][norm] / first["rlkd"][norm] - 1) < 1e-4, (f, norm, first)
    gradient = vocabulary * width * 4
    return [
        f"| {rows} | {vocabulary:,} | {FORMS[f]} | {statistics.median(taken[f]):.3f} | "
        f"{ratio(taken[f], taken['rlkd']):.2f} | {first[f]['extra'] / MIB:.0f} | "
        f"{(first[f]['extra'] - gradient) / MIB:.0f} |"
        for f in forms
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trl-python", help="the Python of an environment with TRL (benchmarks/vs_trl.py)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    head, trl = about("torch"), site_of(options.trl_python)
    rows = [row for size in SIZES for row in measured(size, options.rounds, options.threads, trl)]
    written("head.md", [
        "# The log-prob head",
        "",
        f"`python -m benchmarks.head`, {head}",
        f"float32, {options.threads} threads, forward and backward, medians of {options.rounds} rounds after a first "
        "call." + ("" if trl else " TRL's function was not run."),
        "",
        "| rows T | vocabulary V | form | seconds | × rlkd's | MiB beyond its inputs | without the weight's gradient |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ], options.results)  # fmt: skip


if __name__ == "__main__":
    main()
