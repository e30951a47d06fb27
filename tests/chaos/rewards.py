"""A reward that any text earns now and then, so that the learner has something to learn from."""

from typing import Any


def even(prompt: Any, text: str) -> float:  # noqa: ARG001 - every reward is given the prompt
    return float(sum(map(ord, text)) % 2)
