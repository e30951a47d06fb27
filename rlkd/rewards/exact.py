"""Is the answer, as text, the one that is asked for?"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.extract import Where, place
from rlkd.rewards.options import check_regex, wrong


@dataclass(frozen=True)
class Exact:
    r"""1 if the place `where` of the answer equals `Prompt.answer` after normalising both, else 0.

    where: all | last_line | tag (`<answer>…</answer>`) | boxed (`\boxed{…}`) | regex (its first group); the last such
    place counts, and an answer without one scores 0.
    """

    weight: float = 1.0
    where: Where = "all"
    tag: str = "answer"  # for where=tag
    pattern: str = ""  # for where=regex
    ignore_case: bool = True
    ignore_space: bool = True  # runs of white space count as one blank, at both ends as nothing

    def __post_init__(self) -> None:
        if self.where == "regex":
            if not self.pattern:
                raise wrong(self, "pattern", "where=regex needs one", r"for example pattern: 'answer is (\w+)'")
            check_regex(self, "pattern")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        gold = self._normal(prompt.answer)
        found = [place(a.text, self.where, self.tag, self.pattern) for a in answers]
        return [float(text is not None and self._normal(text) == gold) for text in found]

    def _normal(self, text: str) -> str:
        if self.ignore_space:
            text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
