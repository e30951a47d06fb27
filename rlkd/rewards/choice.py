"""Multiple choice: which letter was chosen?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.extract import boxed, tagged, without_thoughts


@dataclass(frozen=True)
class Choice:
    r"""1 if the letter chosen is the letter of `Prompt.answer` ("B", "(B)", "B."), else 0.

    The letter is read after `</think>`, in the last `<answer>…</answer>` if any, in the last `\boxed{…}` if any, from
    the first of: nothing but the letter, or the letter and its option ("B", "(B)", "B. Paris"); the last "answer is
    B"; the last "(B)". A letter inside prose does not count: "A cat" is no A.

    Raises ValueError if the prompt's answer is no letter: that row is not for this reward.
    """

    weight: float = 1.0
    letters: str = "ABCDEFGHIJ"

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        gold = self._alone(prompt.answer)
        if gold is None:
            raise ValueError(f"the prompt's answer {prompt.answer!r} is none of the letters {self.letters}")
        return [float(self.chosen(a.text) == gold) for a in answers]

    def chosen(self, text: str) -> str | None:
        """The letter an answer chooses, in upper case; None if it chooses none."""
        text = without_thoughts(text)
        inside = tagged(text, "answer")
        text = text if inside is None else inside
        inside = boxed(text)
        text = text if inside is None else inside
        alone = self._alone(text)
        if alone is not None:
            return alone
        one = f"[{re.escape(self.letters)}]"
        # possessive (`*+`): three runs of white space in a row would share a long one in n³ ways
        for pattern in (rf"(?i:answer)\s*+(?i:is|:)?+\s*+:?+\s*+\**+\(?+({one})\b", rf"\(({one})\)"):
            found = re.findall(pattern, text)
            if found:
                return str(found[-1])
        return None

    def _alone(self, text: str) -> str | None:
        r"""The letter if the text is a letter, perhaps with its option behind it; `\text{B}` is B."""
        text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*+\{([^{}\n]*+)\}", r"\1", text).strip().strip("*$ ")
        letter = f"[{re.escape(self.letters)}]"
        found = re.fullmatch(rf"\(?({letter})(?:\)|[.:)]\s.*|[.:])?", text, re.IGNORECASE | re.DOTALL)
        return found.group(1).upper() if found else None
