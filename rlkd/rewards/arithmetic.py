"""The tiny student's task: worked additions that end in `#` and the sum (rlkd/models/arithmetic.py)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlkd.core.types import Answer, Prompt

_FINAL = re.compile(r"#(\d+)\s*\Z", re.ASCII)


@dataclass(frozen=True)
class Arithmetic:
    """1 if the text ends in `#` and the right digits, else 0. The columns before it are not looked at."""

    weight: float = 1.0

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        found = [_FINAL.search(a.text) for a in answers]
        return [float(f is not None and f.group(1) == prompt.answer) for f in found]
