"""Rewards for how long an answer is, in tokens (`Answer.tokens`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.options import wrong


@dataclass(frozen=True)
class Length:
    """From `at_start` for an empty answer to `at_end` for one of `tokens` or more. With u = min(L / tokens, 1):

        linear   at_start + (at_end − at_start) · u
        cosine   at_end + ½ (at_start − at_end) (1 + cos πu)

    Cosine: Yeo et al. 2025, arXiv:2502.03373, equation CosFn. Swap the ends to favour long answers.
    """

    weight: float = 1.0
    tokens: int = 256
    at_start: float = 1.0
    at_end: float = 0.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise wrong(self, "tokens", "must be at least 1", "give the length at which `at_end` is reached")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        return [self._of(a.tokens) for a in answers]

    def _of(self, tokens: int) -> float:
        u = min(tokens / self.tokens, 1.0)
        if self.shape == "cosine":
            u = (1.0 - math.cos(math.pi * u)) / 2.0
        return self.at_start + (self.at_end - self.at_start) * u


@dataclass(frozen=True)
class Overlong:
    """A soft punishment before the length limit. With L tokens, L_max = `max_tokens`, L_buf = `buffer`:

        r = φ · clip(−(L − (L_max − L_buf)) / L_buf, −1, 0)

    DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13 (φ = `penalty` = 1).
    """

    weight: float = 1.0
    max_tokens: int = 256  # normally sampler.max_tokens
    buffer: int = 64
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.max_tokens:
            raise wrong(self, "buffer", f"not within 1 and max_tokens={self.max_tokens}", "DAPO uses a fifth of it")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        over = [(a.tokens - (self.max_tokens - self.buffer)) / self.buffer for a in answers]
        return [-self.penalty * min(max(o, 0.0), 1.0) for o in over]
