"""Rewards that do what a verifier must not do. Loaded by path into the jail's processes, never into the tests."""

# ruff: noqa: ARG001  # a function reward is given the prompt, whether it wants it or not

import contextlib
import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.code import program


def good(prompt, answer):
    return 1.0 if answer == prompt.answer else 0.0


def raises(prompt, answer):
    if answer == "poison":
        raise ValueError("I cannot read poison")
    return 1.0


def exits(prompt, answer):
    return sys.exit("enough") if answer == "poison" else 1.0


def hangs(prompt, answer):
    while answer == "poison":
        pass
    return 1.0


def swallows(prompt, answer):
    while answer == "poison":
        try:
            time.sleep(0.01)
        except BaseException:
            print("interrupted, going on")
    return 1.0


def swallows_exceptions(prompt, answer):
    while answer == "poison":
        try:
            time.sleep(0.01)
        except Exception:
            print("interrupted, going on")
    return 1.0


def holds_the_interpreter(prompt, answer):
    if answer == "poison":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        return float(7**7**9 > 0)  # minutes in one bytecode
    return 1.0


def backtracks(prompt, answer):
    return float(re.match(r"(a+)+$", "a" * 40 + "b" if answer == "poison" else "a") is not None)


def eats_memory(prompt, answer, mib: int = 512):
    return float(len(bytearray(mib << 20)) > 0) if answer == "poison" else 1.0


def leaves(prompt, answer):
    return os._exit(3) if answer == "poison" else 1.0


def segfaults(prompt, answer):
    return float(ctypes.string_at(0)[0]) if answer == "poison" else 1.0


def strange(prompt, answer):
    values = {"nan": math.nan, "inf": math.inf, "text": "1.0", "huge": 1e30, "list": [1.0], "complex": 1j}
    values |= {"integer": 10**5000, "none": None, "true": True}
    return values.get(answer, 1.0)


def prints(prompt, answer):
    while answer == "poison":
        print("the same thing again " * 10)
    return 1.0


def closes_stdout(prompt, answer):
    sys.stdout.close()
    return 1.0


def own_alarm(prompt, answer):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(1)  # would end an idle child
    return 1.0


def leaves_a_fork(prompt, answer, note: str = ""):
    """The fork keeps every file descriptor open and sleeps on; the child itself ends."""
    if answer == "poison":
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        with Path(note).open("a") as f:
            f.write(f"{pid}\n")
        os._exit(4)
    return 1.0


def leaves_a_session(prompt, answer, note: str = ""):
    """A subprocess in a session of its own, out of reach of signals to the child's process group."""
    if answer == "poison":
        sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with Path(note).open("a") as f:
            f.write(f"{sleeper.pid}\n")
        raise ValueError("left one behind")
    return 1.0


def hangs_with_a_session(prompt, answer, note: str = ""):
    Path(note).write_text(str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid))
    return hangs(prompt, answer)


def comes_back_twice(prompt, answer):
    if os.fork() == 0:
        time.sleep(0.1)
    return float(len(answer))


def fails_once(prompt, answer, note: str = ""):
    if not Path(note).exists():
        Path(note).write_text("failed")
        raise OSError("the first time only")
    return 1.0


def meets(prompt, answer, folder: str = "", parties: int = 4):
    """Returns only once as many calls as there are parties are under way at the same time."""
    Path(folder, answer).touch()
    while len(list(Path(folder).iterdir())) < parties:
        time.sleep(0.01)
    return 1.0


def writes_a_huge_file(prompt, answer, path: str = "", size: int = 1 << 30):
    """One byte behind a hole: takes no space."""
    if answer == "poison":
        with Path(path).open("wb") as f:
            f.seek(size)
            f.write(b"x")
    return 1.0


def floods_the_channel(prompt, answer, piece: str = "ff"):
    """Writes into every socket it has, as a library that closes the wrong descriptor and opens its own might."""
    for descriptor in range(3, 64):
        if answer == "poison" and os.path.realpath(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith(
            "socket:"
        ):
            os.write(descriptor, bytes.fromhex(piece) * 4)
            with contextlib.suppress(OSError):
                os.write(descriptor, b"\xff" * (1 << 17))
    return 1.0


def forks_many(prompt, answer, note: str = "", most: int = 60):
    """Sleeping children and grandchildren, half of them in sessions of their own."""
    if answer == "poison":
        for i in range(most):
            if os.fork() == 0:
                if i % 2:
                    os.setsid()
                with Path(note).open("a") as f:
                    f.write(f"{os.getpid()}\n")
                time.sleep(600)
        time.sleep(600)
    return 1.0


def changes_its_mind(prompt, answer, note: str = ""):
    """A score that depends on the process it is asked in."""
    if answer == "fickle":
        with Path(note).open("a") as f:
            f.write("x")
        return float(Path(note).stat().st_size)
    return 1.0


def extracts_code(prompt, answer):
    """Not pathological itself: the part of the reward `code` that reads answers."""
    return float(isinstance(program(answer), str))


def starts_a_thread(prompt, answer):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 1.0


@dataclass(frozen=True)
class Compares:
    """The share of the group that an answer is longer than; raises on poison."""

    weight: float = 1.0

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        if any(a.text == "poison" for a in answers):
            raise ValueError("poison in the group")
        return [sum(len(b.text) < len(a.text) for b in answers) / len(answers) for a in answers]


@dataclass(frozen=True)
class Short:
    """Forgets the last answer."""

    weight: float = 1.0

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
        return [1.0] * (len(answers) - 1)


@dataclass(frozen=True)
class Text:
    weight: float = 1.0

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> str:
        return "1" * len(answers)


@dataclass(frozen=True)
class Slow:
    """Reads as many seconds from each answer as it then sleeps."""

    weight: float = 1.0

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        for a in answers:
            time.sleep(float(a.text))
        return [1.0] * len(answers)
