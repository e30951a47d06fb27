r"""Mathematical equality, with math-verify behind a fast path for integers and equal strings."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.extract import boxed, tagged, without_thoughts
from rlkd.rewards.guard import LONGEST, too_heavy

_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)
_SPACES = re.compile(r"\\[ ,;!:]|\\left|\\right|[\s$]+")
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")  # prose; \frac and \sqrt are none


@dataclass(frozen=True)
class Math:
    r"""1 if the answer is mathematically equal to `Prompt.answer`, else 0; None if that cannot be parsed.

    Where the answer is looked for: after `</think>`; in the last `<answer>…</answer>` if any; in the last `\boxed{…}`
    if any; else, with `where: any`, where math-verify finds the last expression in the last 2000 characters.
    `where: tag` or `where: boxed` insists on that place: an answer without it scores 0.

    Equal strings and two integers are compared as such. Otherwise math-verify parses and sympy compares, with their own
    time limits off (unsound outside the main thread, Math-Verify issue 65): the verifier's jail bounds them. What
    cannot be parsed, or is too heavy to be evaluated (rewards/guard.py), is not shown to be equal: 0.
    """

    weight: float = 1.0
    where: Literal["any", "tag", "boxed"] = "any"

    def prepare(self) -> None:
        """Import sympy and build math-verify's parser (0.5 s) before children are forked."""
        _equal(r"\frac{1}{2}", "0.5x")

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        gold = prompt.answer.strip()
        gold = inside if (inside := boxed(gold)) is not None else gold
        return [self._same(gold, self.candidate(a.text)) for a in answers]

    def candidate(self, text: str) -> str | None:
        r"""The part of a text that holds its answer, as LaTeX in `\boxed{…}` where that is known; None without one."""
        text = without_thoughts(text)
        inside = tagged(text, "answer")
        if inside is None and self.where == "tag":
            return None
        text = (text if inside is None else inside).strip()
        box = boxed(text)
        if box is not None:
            return _box(box)
        if self.where == "boxed":
            return None
        if "$" not in text and not _WORDS.search(text) and (inside is not None or "\n" not in text):
            return _box(text)
        return text[-LONGEST:]

    def _same(self, gold: str, candidate: str | None) -> float | None:
        plain_gold = _plain(gold)
        if not plain_gold:
            return None
        if candidate is None:
            return 0.0
        box = boxed(candidate)
        if box is not None:
            plain = _plain(box)
            if plain == plain_gold:
                return 1.0
            if _INTEGER.fullmatch(plain) and _INTEGER.fullmatch(plain_gold):
                return float(_integer(plain) == _integer(plain_gold))
        if too_heavy(gold) or not _parsed(_box(gold.strip("$ "))):
            return None
        if too_heavy(candidate if box is None else box):
            return 0.0
        return float(_equal(gold.strip("$ "), candidate))


def _box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _plain(text: str) -> str:
    r"""Without spaces, `$`, `\left` and a full stop at the end."""
    return _SPACES.sub("", text).rstrip(".")


def _integer(text: str) -> str:
    """An integer in one way of writing; as a string, since Python refuses to read more than 4300 digits."""
    digits = text.lstrip("+-").replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if text.startswith("-") and digits != "0" else digits


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a text: a sympy expression and its string; empty if nothing."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off; the jail's is on
    return tuple(parse(text, parsing_timeout=None))


def _equal(gold: str, candidate: str) -> bool:
    from math_verify import verify

    return bool(verify(list(_parsed(_box(gold))), list(_parsed(candidate)), timeout_seconds=None))
