"""`python -m tests.cluster.hold ADDRESS`: leaves room for one rank of the learner on each node that stays, while it
runs. For clusters that a test cannot join itself."""

import sys
import time

import ray

from rlkd.workers.nodes import STABLE, alive
from rlkd.workers.placement import A_LITTLE
from tests.cluster.help import take

if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    until = time.monotonic() + 60
    while len(nodes := alive()) < 4:
        assert time.monotonic() < until, f"only {len(nodes)} nodes came"
        time.sleep(0.5)
    for node in nodes:
        if node.stable:
            take(node.id, {STABLE: 1 - A_LITTLE})
    print("held", flush=True)
    time.sleep(3600)
