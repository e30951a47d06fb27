"""`rlkd check`: does the reward work on real rows, before anything is trained?"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkd.core.types import Answer, Finish, Prompt
from rlkd.core.verdict import Verdict
from rlkd.engines.jail import Jail

WRONG = "I do not know."
ROWS = 3


@dataclass(frozen=True)
class Probe:
    """One row, judged: `verdicts[i]` is that of `answers[i]`."""

    prompt: Prompt
    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]
    seconds: float


def gold_and_wrong(prompt: Prompt) -> tuple[Answer, ...]:
    """The row's own answer as the answer, and a wrong one. As for tokens, words are counted."""
    return tuple(Answer(text, Finish.STOP, len(text.split())) for text in (prompt.answer, WRONG))


def probe(
    rewards: bytes,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]] | None = None,
    limits: Mapping[str, Any] | None = None,
) -> list[Probe]:
    """The first ROWS prompts, each judged in the jail on `answers[i]` (without: its gold answer and a wrong one).

    `limits` are further arguments of Jail. DataError RLKD-D303 if the rewards cannot be loaded; a reward that fails on
    a row is in its verdict.
    """
    jail = Jail(rewards, **(limits or {}))
    try:
        jail.start()
        probes = []
        for i, prompt in enumerate(prompts[:ROWS]):
            tried = tuple(gold_and_wrong(prompt) if answers is None else answers[i])
            began = time.monotonic()
            verdicts = tuple(jail.score(prompt, tried))
            probes.append(Probe(prompt, tried, verdicts, time.monotonic() - began))
        return probes
    finally:
        jail.close()
