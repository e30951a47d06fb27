"""Runs recipes one after the other in one process, as `rlkd train` does, on a Ray cluster that this process starts and
they join: imports and Ray's own start are most of the seconds of a short run.

A line of JSON on stdin, {"recipe": path, "overrides": [...]}, is answered by one on stdout; all talk is on stderr.
"""

import json
import os
import sys
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from rlkd import staged
from rlkd.config.stages import load
from rlkd.core.errors import RlkdError


def run(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """The exit code, the seconds it took, and the error if there was one."""
    began = time.monotonic()
    try:
        code, error = staged.train(load(recipe, overrides), Path(recipe)), ""
    except RlkdError as e:
        code, error = e.exit_code, str(e)
    except Exception:
        code, error = 1, traceback.format_exc()
    return {"code": code, "seconds": time.monotonic() - began, "error": error}


def main() -> None:
    answers, node = sys.stdout, {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    with redirect_stdout(sys.stderr):
        cluster = Cluster(initialize_head=True, head_node_args=node)
        os.environ["RAY_ADDRESS"] = cluster.address
        try:
            for line in sys.stdin:
                print(json.dumps(run(**json.loads(line))), file=answers, flush=True)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
