"""The fast engine, slow until a file appears: what happens to the cluster meanwhile happens in the middle of a run."""

import os
import time
from pathlib import Path

from tests.chaos.fast_engine import FastEngine

GATE = "RLKD_TEST_GATE"  # the file; in the environment of the raylets
SLOW_S = 0.3  # a token


class PacedEngine(FastEngine):
    def _step(self) -> None:
        if not Path(os.environ[GATE]).exists():
            time.sleep(SLOW_S)
        super()._step()
