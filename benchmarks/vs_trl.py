"""rlkd's step beside TRL's GRPOTrainer: same model, prompts, answer lengths, learning rate, threads.

    python benchmarks/vs_trl.py --model models/smollm2 --trl-python .venv-trl/bin/python [--repeats 3] [--teacher all]

Both sides write exactly the same number of tokens (lengths are forced), at uniform lengths and with a long tail, and
make the same number of optimizer steps; the first step of each run is a warm-up and not counted. Runs alternate, the
ratio is taken pair by pair, and the median is what counts. With `--teacher` rlkd runs KDRL with a second copy of the
model as its teacher, of all answers or of wrong ones (by chance about half), and TRL its KL term to a reference, which
is the same copy and scores all answers. TRL runs in an environment of its own:

    python3 -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.19.0
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS, SAMPLES, STEPS, MAX_TOKENS = 4, 8, 2, 128  # prompts a step, answers a prompt, steps that count


def spec(kind: str, model: str, threads: int, seed: int, teacher: str | None = None) -> dict[str, Any]:
    """What both sides do: `lengths[step][row]` answer tokens."""
    rng = random.Random(seed)
    prompts = [
        [f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)}? Think step by step." for _ in range(PROMPTS)]
        for _ in range(STEPS + 1)
    ]
    rows = PROMPTS * SAMPLES
    if kind == "uniform":
        lengths = [[MAX_TOKENS] * rows for _ in prompts]
    else:  # lognormal, median 24, σ 1, at most 192
        lengths = [[max(2, min(192, round(24 * rng.lognormvariate(0, 1)))) for _ in range(rows)] for _ in prompts]
    kd = {} if teacher is None else {"teacher": model, "distill": teacher}
    return {"model": model, "threads": threads, "samples": SAMPLES, "lr": 1e-6, "trl_batch": 8,
            "prompts": prompts, "lengths": lengths, **kd}  # fmt: skip


def run(python: str, script: str, work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side, once; seconds of every step."""
    spec_path, out = folder / "spec.json", folder / "out.json"
    spec_path.write_text(json.dumps(work))
    out.unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": str(work["threads"]), "HF_HUB_OFFLINE": "1"}
    log = folder / f"{script}.log"
    with log.open("w") as f:
        done = subprocess.run([python, str(HERE / script), str(spec_path), str(out)], env=env, stdout=f, stderr=f,
                              timeout=3600, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} failed ({done.returncode}):\n" + log.read_text()[-3000:])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kinds", nargs="+", default=["uniform", "tail"], choices=["uniform", "tail"])
    parser.add_argument("--teacher", choices=["all", "wrong"], help="which answers it scores")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or HERE / "results" / (f"vs_trl_teacher_{args.teacher}.json" if args.teacher else "vs_trl.json")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repeat in range(args.repeats):
            for kind in args.kinds:
                work = spec(kind, str(Path(args.model).resolve()), args.threads, repeat, args.teacher)
                trl = run(args.trl_python, "trl_side.py", work, folder)
                ours = run(sys.executable, "rlkd_side.py", work, folder)
                tokens = sum(sum(step) for step in work["lengths"][1:]) / STEPS
                row = {
                    "kind": kind,
                    "repeat": repeat,
                    "answer_tokens_per_step": tokens,
                    "trl_s": statistics.median(trl["seconds"][1:]),
                    "rlkd_s": statistics.median(ours["seconds"][1:]),
                    "rlkd_stages": ours["stages"],
                    "load": os.getloadavg()[0],
                }
                row["ratio"] = row["trl_s"] / row["rlkd_s"]
                rows.append(row)
                print(json.dumps(row), flush=True)
                write(rows, out, args.threads, args.teacher)
    print(table(json.loads(out.read_text())["summary"]))


def write(rows: list[dict[str, Any]], out: Path, threads: int, teacher: str | None) -> None:
    """The result so far: a benchmark that was stopped has the pairs it measured."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    summary = {
        kind: {
            "pairs": len(pairs),
            "ratio_median": statistics.median(r["ratio"] for r in pairs),
            "ratios": [round(r["ratio"], 2) for r in pairs],
            "trl_samples_per_s": statistics.median(PROMPTS * SAMPLES / r["trl_s"] for r in pairs),
            "rlkd_samples_per_s": statistics.median(PROMPTS * SAMPLES / r["rlkd_s"] for r in pairs),
        }
        for kind, pairs in of.items()
    }
    about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(),
             "cores": os.cpu_count(), "threads": threads, "teacher": teacher}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "summary": summary, "runs": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"`python benchmarks/vs_trl.py`, {about}\n\n```\n{table(summary)}\n```\n")


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'lengths':<10}{'TRL samples/s':>15}{'rlkd samples/s':>16}{'ratio (median)':>16}   ratios"]
    lines += [
        f"{kind:<10}{s['trl_samples_per_s']:>15.2f}{s['rlkd_samples_per_s']:>16.2f}{s['ratio_median']:>16.2f}   "
        f"{s['ratios']}"
        for kind, s in summary.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
