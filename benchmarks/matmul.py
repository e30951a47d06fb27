"""Billions of operations a second of float32 products, torch.mm beside rlkd.core.matmul, at the shapes of SmolLM2-135M.

python benchmarks/matmul.py [--repeats 7]      # writes benchmarks/results/matmul.md
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlkd.core.matmul import product

SHAPES = {  # tokens × in × out
    "up": (2100, 576, 1536),
    "down": (2100, 1536, 576),
    "query": (2100, 576, 576),
    "head, 128 rows": (128, 576, 49152),
}


def rate(call: Callable[[], object], operations: float, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return operations / statistics.median(seconds[2:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(os.cpu_count() or 1)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}, float32, billions of"
        f" operations a second, medians of {repeats}; `python benchmarks/matmul.py`\n",
        "| product | forward: torch | ours | to x: torch | ours | to W: torch | ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (m, k, n) in SHAPES.items():
        x, weight, grad = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        pairs = [(x, weight.T), (grad, weight), (grad.T, x)]
        cells = [
            f"{rate(lambda f=f, a=a, b=b: f(a, b), 2 * m * k * n, repeats):.0f}"  # type: ignore[misc]
            for a, b in pairs
            for f in (torch.mm, product)
        ]
        lines.append(f"| {name} ({m}×{k}×{n}) | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_name("results").joinpath("matmul.md").write_text(text)


if __name__ == "__main__":
    main()
