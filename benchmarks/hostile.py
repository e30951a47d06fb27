"""The reward `math`, which some answers make hang, fork, eat memory or die: for benchmarks/verifier.py."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.math import Math


def forks(note: str) -> NoReturn:
    """Five children in sessions of their own, out of reach of signals to the group; then hangs."""
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            with Path(note).open("a") as f:
                f.write(f"{os.getpid()}\n")
            time.sleep(600)
            os._exit(0)
    while True:
        time.sleep(1)


DEEDS: dict[str, Callable[[str], object]] = {
    "sleeps": lambda _: time.sleep(600),
    "holds the interpreter": lambda _: 7**7**8,
    "forks": forks,
    "eats memory": lambda _: bytearray(8 << 30),
    "leaves": lambda _: os._exit(3),
}


@dataclass(frozen=True)
class Hostile(Math):
    """As `math`; an answer that is the name of a deed does it. `note`: the file for the pids of who was forked."""

    note: str = ""

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        for answer in answers:
            if answer.text in DEEDS:
                DEEDS[answer.text](self.note)
        return super().score(prompt, answers)
