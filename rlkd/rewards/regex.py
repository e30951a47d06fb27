"""Does the answer match a regular expression?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.options import MISSING, check_regex, wrong


@dataclass(frozen=True)
class Regex:
    """1 if `pattern` matches, else 0. `{answer}` in the pattern stands for the prompt's answer, taken literally.

    Matching is Python's `re`, with `.` matching line ends. A pattern that backtracks for ever ends with the verifier's
    timeout.
    """

    weight: float = 1.0
    pattern: str = MISSING
    match: Literal["search", "whole"] = "search"  # anywhere, or the whole answer
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.pattern == MISSING:
            raise wrong(self, "pattern", "must be given", r"for example pattern: '#\s*{answer}$'")
        check_regex(self, "pattern")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        pattern = re.compile(self.pattern.replace("{answer}", re.escape(prompt.answer)), flags)
        matches = pattern.fullmatch if self.match == "whole" else pattern.search
        return [float(matches(a.text) is not None) for a in answers]
