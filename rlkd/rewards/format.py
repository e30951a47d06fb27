"""Is the answer laid out as asked? Says nothing about whether it is right."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.options import check_regex, wrong


@dataclass(frozen=True)
class Format:
    """1 if every tag stands exactly once, opened and closed, one pair after the other in the order given, else 0.

    AMPO §2.2 (algorithms.md): `tags: [answer]` asks for exactly one `<answer>` and exactly one `</answer>` in order;
    `[think, answer]` is the form of R1. `alone` allows nothing but white space outside the tags. `pattern` must match
    too if given (`re`, anywhere, `.` matches line ends); with `tags: []` it is all that is asked.
    """

    weight: float = 1.0
    tags: tuple[str, ...] = ("answer",)
    alone: bool = False
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not self.tags and self.pattern is None:
            raise wrong(self, "tags", "nothing to check without a pattern", "give tags, a pattern, or leave it out")
        if self.pattern is not None:
            check_regex(self, "pattern")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        return [float(self._tagged(a.text) and self._matches(a.text)) for a in answers]

    def _tagged(self, text: str) -> bool:
        rest = text
        for tag in self.tags:
            if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
                return False
            before, opened, after = rest.partition(f"<{tag}>")
            _, closed, rest = after.partition(f"</{tag}>")
            if not opened or not closed or (self.alone and before.strip()):
                return False
        return not (self.alone and rest.strip())

    def _matches(self, text: str) -> bool:
        return self.pattern is None or re.search(self.pattern, text, re.DOTALL) is not None
