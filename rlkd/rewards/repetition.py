"""A punishment for saying the same thing again and again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.options import wrong


@dataclass(frozen=True)
class Repetition:
    """Counts windows of `words` consecutive words (split at white space).

        window   −penalty if any window occurs at least `times` times, else 0. AMPO §2.2 (algorithms.md): 10, 10, 1
        smooth   −penalty · (1 − different windows / windows). Yeo et al. 2025, arXiv:2502.03373, with `words` = 3

    `spare_zero`: added only where the sum of the other rewards is not 0, as in AMPO (rewards/mix.py).
    """

    weight: float = 1.0
    words: int = 10
    times: int = 10
    penalty: float = 1.0
    shape: Literal["window", "smooth"] = "window"
    spare_zero: bool = True

    def __post_init__(self) -> None:
        if self.words < 1:
            raise wrong(self, "words", "a window has at least one word", "AMPO uses 10")
        if self.times < 2:
            raise wrong(self, "times", "once is no repetition", "AMPO uses 10")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        return [self._of(a.text) for a in answers]

    def _of(self, text: str) -> float:
        words = text.split()
        windows = Counter(tuple(words[i : i + self.words]) for i in range(len(words) - self.words + 1))
        if not windows:
            return 0.0
        if self.shape == "smooth":
            return -self.penalty * (1.0 - len(windows) / windows.total())
        return -self.penalty if max(windows.values()) >= self.times else 0.0
