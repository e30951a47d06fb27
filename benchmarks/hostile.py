"""math's reward, which some answers make hang, fork, eat memory or die: for benchmarks/verifier.py. Loaded by its path."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.math import Math


def forks() -> NoReturn:
    """Five children in sessions of their own, out of reach of signals to the group; then hangs."""
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
            os._exit(0)
    while True:
        time.sleep(1)


DEEDS: dict[str, Callable[[], object]] = {
    "sleeps": lambda: time.sleep(600),
    "holds the interpreter": lambda: 7**7**8,
    "forks": forks,
    "eats memory": lambda: bytearray(8 << 30),
    "leaves": lambda: os._exit(3),
}


@dataclass(frozen=True)
class Hostile(Math):
    """As `math`; an answer that is the name of a deed does it."""

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        for answer in answers:
            DEEDS.get(answer.text, lambda: None)()
        return super().score(prompt, answers)
