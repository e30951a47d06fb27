"""A run on five nodes, of which one is drained, one killed, and one joins: many times over.

    python -m benchmarks.nodes            20 times; written to benchmarks/results/nodes.md
    python -m benchmarks.nodes -n 3

Each time a new cluster, real Ray actors, verifiers and DeepSpeed (two ranks on two nodes); the sampler is a fast engine
without a model. The ledger must be that of a run that was left in peace (tests/cluster/scenario.py).
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlkd.models.get import get
from rlkd.report.files import replace_file
from tests.cluster.scenario import STEPS, Story, disturbed, quiet

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--times", type=int, default=20)
    parser.add_argument("--add", action="store_true", help="to the repetitions that are written down already")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))
    model, began = get("tiny", folder / "tiny"), time.time()
    peaceful = quiet(folder, model)
    stories, failed = written() if options.add else ([], [])
    for number in range(options.times):
        try:
            stories.append(disturbed(folder / str(number), model, peaceful))
            shutil.rmtree(folder / str(number))  # kept if something went wrong
            said = str(asdict(stories[-1]))
        except (AssertionError, RuntimeError, TimeoutError) as error:
            said = f"failed: {str(error)[:400]}"
            failed.append(f"{len(stories) + len(failed) + 1}: {str(error)[:400]}")
        print(f"[{number + 1}/{options.times}] {said}", flush=True)
        write(stories, failed, began)
    if not failed:
        shutil.rmtree(folder)
    return int(bool(failed))


def written() -> tuple[list[Story], list[str]]:
    """The repetitions of earlier calls: whole ones, failed ones."""
    try:
        found = json.loads((RESULTS / "nodes.json").read_text())
    except FileNotFoundError:
        return [], []
    return [Story(**{**row, "steps_at": tuple(row["steps_at"])}) for row in found["whole"]], found["failed"]


def write(stories: Sequence[Story], failed: Sequence[str], began: float) -> None:
    """The table for people, and the numbers behind it."""
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(began))
    lines = [
        "# Nodes that come and go",
        "",
        f"`python -m benchmarks.nodes` on {day} UTC, two cores for everything: five raylets, two learner ranks on two",
        "nodes (gloo), one to four rollout workers, one reward worker. In each repetition a node with workers is",
        "drained, a new one joins, and another one is killed (SIGKILL to its raylet). Compared with a run in peace.",
        "",
        f"- repetitions: {len(stories) + len(failed)}, whole: {len(stories)}, failed: {len(failed)}",
        f"- steps each: {STEPS}; every ledger that of the quiet run, step by step; no prompt twice",
    ]
    for text, values in (
        ("seconds of a repetition, cluster and run", [s.run_s for s in stories]),
        ("seconds from the new node to four workers on it and beside it", [s.moved_s for s in stories]),
        ("seconds from the kill to four workers again", [s.replaced_s for s in stories]),
        ("MiB of weights sent to other nodes", [s.sent_mib for s in stories]),
    ):
        if values:
            middle = statistics.median(values)
            lines.append(f"- {text}: median {middle:.1f}, {min(values):.1f} to {max(values):.1f}")
    lines += [f"- failed: {text}" for text in failed]
    RESULTS.mkdir(exist_ok=True)
    replace_file(RESULTS / "nodes.md", "\n".join(lines) + "\n")
    replace_file(
        RESULTS / "nodes.json",
        json.dumps({"whole": [asdict(s) for s in stories], "failed": list(failed)}, indent=1) + "\n",
    )


if __name__ == "__main__":
    sys.exit(main())
