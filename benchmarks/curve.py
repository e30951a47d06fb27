"""A run's reward curve and seconds per step by stage, as a page for benchmarks/results/.

python benchmarks/curve.py runs/grpo-smollm2 > benchmarks/results/grpo-smollm2.md
"""

import json
import os
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

STAGES = ("rollout", "verify", "score", "learn", "sync")


def number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main(directory: str) -> None:
    run = Path(directory)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    packages = json.loads((run / "run.json").read_text())["attempts"][-1]["packages"]
    print(f"# {run.name}\n")
    print(
        f"{date.today()}, {os.cpu_count()} cores, no GPU; " + ", ".join(f"{k} {v}" for k, v in packages.items()) + ".\n"
    )
    for path in sorted((run / "eval").glob("step-*.json")):
        found = json.loads(path.read_text())
        value, low, high = (found[f"eval/pass@1{end}"] for end in ("", "/low", "/high"))
        print(f"Held out after step {found['step']}: pass@1 {value:.3f} [{low:.3f}, {high:.3f}].\n")
    print("| step | reward | tokens an answer | mismatch max | seconds | " + " | ".join(STAGES) + " |")
    print("|---" * (5 + len(STAGES)) + "|")
    for row in rows:
        cells = [str(row["step"]), number(row["reward/mean"], 3), number(row["length/mean"], 1)]
        cells += [f"{row['mismatch/max']:.1e}", number(row["seconds/step"], 2)]
        cells += [number(row.get(f"seconds/{s}"), 2) for s in STAGES]
        print("| " + " | ".join(cells) + " |")
    medians = [statistics.median(row.get(f"seconds/{s}") or 0.0 for row in rows) for s in ("step", *STAGES)]
    print(
        "\nMedian seconds: " + ", ".join(f"{s} {m:.2f}" for s, m in zip(("step", *STAGES), medians, strict=True)) + "."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
