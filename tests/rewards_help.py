"""Shared by the tests of rewards: one answer, scored by one reward."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlkd.core.types import Answer, Finish, Prompt
from rlkd.rewards.table import find


def prompt(answer: str = "42", metadata: Mapping[str, object] | None = None) -> Prompt:
    return Prompt("p7", np.zeros(3, np.int32), answer, metadata=metadata or {})


def score(name: str, text: str, gold: str = "42", tokens: int = 0, **options: Any) -> float | None:
    reward = find(name)(**options)
    (only,) = reward.score(prompt(gold), [Answer(text, Finish.STOP, tokens)])
    assert only is None or isinstance(only, float)
    return only
