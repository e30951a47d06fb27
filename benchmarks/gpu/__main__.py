"""What the learner's own parts do on a GPU: right numbers first, then seconds and memory.

    python -m benchmarks.gpu                          a few minutes; needs torch, transformers, jaxtyping and blake3
    python -m benchmarks.gpu --device cpu --small     the same code on a CPU, as the tests run it

Models are random, of real shapes. The table comes last and is written to benchmarks/results/gpu-DEVICE.md. Without
flash-attn its rows are left out, and that is said. DeepSpeed's step and vLLM are not part of this.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import parts
from benchmarks.gpu.shapes import LARGE, SMALL, Shape

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Bench:
    """Rows of the table; a bound that does not hold is a failure."""

    device: torch.device
    shape: Shape
    repeats: int
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def say(self, part: str, what: str, value: str) -> None:
        self.rows.append((part, what, value))
        print(f"{part:<12} {what:<58} {value}", flush=True)

    def bound(self, part: str, what: str, value: float, most: float) -> None:
        """NaN does not hold any bound."""
        holds = value <= most
        self.say(part, what, f"{value:.2e} (≤ {most:.0e}{'' if holds else ', **DOES NOT HOLD**'})")
        if not holds:
            self.failed.append(f"{part}: {what}")

    def timed(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Median seconds, and the most GiB allocated above what there was (NaN on a CPU)."""
        gpu = self.device.type == "cuda"
        seconds: list[float] = []
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for turn in range(self.repeats + 1):
            began = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            if turn:  # the first one compiles and allocates
                seconds.append(time.perf_counter() - began)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if gpu else float("nan")
        return statistics.median(seconds), peak


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for the table")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here: --device cpu --small runs the same code", file=sys.stderr)
        return 3
    bench = Bench(torch.device(options.device), SMALL if options.small else LARGE, options.repeats)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for part in parts.ALL:
            part(bench, Path(folder))
    write(bench, options.results)
    for what in bench.failed:
        print(f"does not hold: {what}", file=sys.stderr)
    return 1 if bench.failed else 0


def write(bench: Bench, results: Path) -> None:
    import transformers

    gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else "CPU"
    flash = "" if find_spec("flash_attn") else " flash-attn is not installed, and was not run."
    lines = [
        f"# The learner's parts on {name}",
        "",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, transformers {transformers.__version__}; medians of "
        f"{bench.repeats}; `python -m benchmarks.gpu`.{flash}",
        "",
        "| part | what | |",
        "|---|---|---|",
        *(f"| {part} | {what} | {value} |" for part, what, value in bench.rows),
        "",
    ]
    results.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (results / f"gpu-{name.replace(' ', '-').lower()}.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    sys.exit(main())
