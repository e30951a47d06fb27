"""The tiny student's task: three-digit addition, written out column by column.

    question   357+468=
    worked     7+8+0=15;5+6+1=12;3+4+1=08;#825

A column is `left digit + right digit + carry = two digits`, from right to left: the first of the two digits is the next
carry, the second a digit of the sum. The final answer follows `#` and ends the text.

The problems fall into two disjoint splits, by a hash of the *unordered* pair of operands: 357+468 and 468+357 are never
one in training and one held out.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

import numpy as np

from rlkd.core.errors import PreflightError

SMALLEST, LARGEST = 100, 999
OPERANDS = LARGEST - SMALLEST + 1
HOLDOUT_ONE_IN = 10
ANSWER_MARK = "#"
LONGEST_WORKED = len("9+9+0=18;9+9+1=19;9+9+1=19;#1998")

_FINAL_ANSWER = re.compile(rf"{ANSWER_MARK}(\d+)\s*\Z", re.ASCII)


class Split(StrEnum):
    TRAIN = "train"
    HOLDOUT = "holdout"


@dataclass(frozen=True)
class Problem:
    """left + right, both in [SMALLEST, LARGEST]."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    @property
    def worked(self) -> str:
        """The right way: every column with its carry, then the mark and the sum."""
        return self.written(lambda: False)

    def written(self, forgets: Callable[[], bool]) -> str:
        """What a pupil writes who may forget a carry: `forgets` is asked once for each carry that is not 0."""
        columns, digits, carry = [], "", 0
        for left, right in zip(reversed(str(self.left)), reversed(str(self.right)), strict=True):
            total = int(left) + int(right) + carry
            columns.append(f"{left}+{right}+{carry}={total:02d};")
            carry, digit = divmod(total, 10)
            digits = f"{digit}{digits}"
            if carry and forgets():
                carry = 0
        return "".join(columns) + ANSWER_MARK + (str(carry) if carry else "") + digits

    @property
    def carries(self) -> int:
        """How many of the three columns carry: each is a place where the pupil may forget."""
        count, carry = 0, 0
        for left, right in zip(reversed(str(self.left)), reversed(str(self.right)), strict=True):
            carry = int(int(left) + int(right) + carry >= 10)
            count += carry
        return count

    @property
    def split(self) -> Split:
        low, high = sorted((self.left, self.right))
        holdout = zlib.crc32(f"{low}+{high}".encode()) % HOLDOUT_ONE_IN == 0
        return Split.HOLDOUT if holdout else Split.TRAIN


def problems(split: Split, count: int, seed: int, carries: int = 0) -> list[Problem]:
    """`count` different problems of one split with at least `carries` carries, in an order given by `seed`.

    Raises PreflightError if the split does not hold that many.
    """
    drawn = list(islice((p for p in _shuffled(split, seed) if p.carries >= carries), count))
    if len(drawn) < count:
        of_those = f" with at least {carries} carries" if carries else ""
        raise PreflightError(
            "RLKD-E701",
            f"{count} problems{of_those} asked for, but the {split.value} split holds {len(drawn)}",
            fix=f"ask for at most {len(drawn)}",
        )
    return drawn


def _shuffled(split: Split, seed: int) -> Iterator[Problem]:
    for index in np.random.default_rng(seed).permutation(OPERANDS * OPERANDS):
        left, right = divmod(int(index), OPERANDS)
        problem = Problem(SMALLEST + left, SMALLEST + right)
        if problem.split is split:
            yield problem


def final_answer(text: str) -> str | None:
    """The digits behind the last mark if they end the text, else None: an answer followed by chatter does not count."""
    found = _FINAL_ANSWER.search(text)
    return found.group(1) if found else None


def score(text: str, answer: str) -> float:
    """1.0 if the text ends in the right final answer, else 0.0. The columns are not looked at."""
    return float(final_answer(text) == answer)
