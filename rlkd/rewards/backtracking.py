"""Regular expressions that take for ever: found when a recipe is loaded, not when an answer comes that they hang on.

Python's `re` tries every way to match. `(a+)+$` has 2^n ways to match n letters, and tries them all before it says no.
Looked at is the parsed pattern: is there an unbounded repetition inside another, or several beside each other? Most
patterns have neither and cost nothing. The others are tried, in a process of its own with a time limit, on texts made
of what they repeat and an end that does not match.
"""

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

SECONDS = 1  # of CPU, for each text
TIMES, LENGTH = 30, 2000  # repetitions that show what doubles with each; characters that show what grows as n³
_UNBOUNDED = 100  # a repetition of so many may as well have no bound
_WAIT_S = 60.0  # on a machine so busy that a second of CPU takes longer, the pattern is not blamed
_WORD, _NO_MATCH = "a", "\x00"

_TRY = """
import re, sys
pattern, text = sys.stdin.read().split("\\x01")
re.search(pattern, text, re.DOTALL)
"""


@lru_cache(maxsize=256)
def endless(pattern: str) -> str | None:
    """A text, shortened, that takes `pattern` longer than SECONDS; None if none was found. re.error if it is none."""
    parsed = _parse(pattern)
    if not _suspicious(parsed):
        return None
    for text in dict.fromkeys(_attacks(parsed)):
        if _hangs(pattern, text):
            return text[:24] + "…" if len(text) > 24 else text
    return None


def _parse(pattern: str) -> Any:
    from re import _parser  # type: ignore[attr-defined]  # there is no public way to a parsed pattern

    return _parser.parse(pattern, re.DOTALL)


def _hangs(pattern: str, text: str) -> bool:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    given = f"{pattern}\x01{text}".encode("utf-8", "surrogatepass")
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _TRY]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_WAIT_S, preexec_fn=limit)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode < 0  # ended by a signal: its time was over


def _repeated(item: Any) -> bool:
    name, value = str(item[0]), item[1]
    return name in ("MAX_REPEAT", "MIN_REPEAT") and int(value[1]) >= _UNBOUNDED


def _parts(item: Any) -> list[Any]:
    """The patterns inside an item."""
    name, value = str(item[0]), item[1]
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return [value[2]]
    if name == "SUBPATTERN":
        return [value[3]]
    if name == "BRANCH":
        return list(value[1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return [value[1]]
    if name == "ATOMIC_GROUP":
        return [value]
    if name == "GROUPREF_EXISTS":
        return [part for part in value[1:] if part is not None]
    return []


def _suspicious(parsed: Any, inside: bool = False) -> bool:
    """Unbounded repetitions: one that holds another or a choice, or three beside each other."""
    items = list(parsed)
    if sum(_repeated(i) for i in items) >= 3:
        return True
    for item in items:
        if inside and (_repeated(item) or str(item[0]) == "BRANCH"):
            return True
        if any(_suspicious(part, inside or _repeated(item)) for part in _parts(item)):
            return True
    return False


def _attacks(parsed: Any, before: str = "") -> Iterator[str]:
    """For each repetition: what leads to it, what it repeats many times, and an end."""
    for item in parsed:
        for part in _parts(item):
            if _repeated(item):
                for body in dict.fromkeys((_example(part), *_examples_inside(part))):
                    for n in (TIMES, max(LENGTH // len(body), 1)):
                        yield before + body * n + _NO_MATCH
            yield from _attacks(part, before)
        before += _example([item])


def _examples_inside(parsed: Any) -> Iterator[str]:
    """Examples of the parts of a pattern, of its choices one by one."""
    for item in parsed:
        for part in _parts(item):
            yield _example(part)
            yield from _examples_inside(part)


def _example(parsed: Any) -> str:
    """A short text that the pattern matches, roughly; never empty."""
    return "".join(_one(item) for item in parsed) or _WORD


def _one(item: Any) -> str:
    name, value = str(item[0]), item[1]
    match name:
        case "LITERAL":
            return chr(value)
        case "NOT_LITERAL":
            return _WORD if value != ord(_WORD) else "b"
        case "IN":
            return _member(value)
        case "AT" | "ASSERT" | "ASSERT_NOT" | "GROUPREF":
            return ""
        case "BRANCH":
            return _example(value[1][0])
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return _example(value[2]) * max(int(value[0]), 1)
        case "SUBPATTERN":
            return _example(value[3])
    return _WORD


def _member(choices: Any) -> str:
    """A character of a set."""
    name, value = str(choices[0][0]), choices[0][1]
    if name == "LITERAL":
        return chr(value)
    if name == "RANGE":
        return chr(value[0])
    category = str(value)
    return " " if category == "CATEGORY_SPACE" else "1" if category == "CATEGORY_DIGIT" else _WORD
