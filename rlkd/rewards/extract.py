r"""The final answer inside what a model wrote. All of it is linear in the text's length.

None means: there is no such place in the text. The *last* place counts, as people correct themselves downwards.
"""

import re
from collections import deque
from typing import Literal

Where = Literal["all", "last_line", "tag", "boxed", "regex"]

_THOUGHTS_END = "</think>"
_BRACE = re.compile(r"\\boxed *\{|[{}]")


def without_thoughts(text: str) -> str:
    """What follows the last `</think>`; everything if there is none (the opening tag may be part of the prompt)."""
    return text.rpartition(_THOUGHTS_END)[2]


def tagged(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>…</tag>`."""
    before, close, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside if close and opened else None


def boxed(text: str) -> str | None:
    r"""What stands in the `\boxed{…}` that begins last of those whose braces close, nested braces included."""
    opened: list[tuple[int, bool]] = []  # where what stands in a brace begins, and whether it is a box's
    best: tuple[int, int] | None = None
    for token in _BRACE.finditer(text):
        if token.group() != "}":
            opened.append((token.end(), token.group() != "{"))
        elif opened:
            start, is_box = opened.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def last_line(text: str) -> str:
    """The last line that is not blank; empty if all are."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def matched(text: str, pattern: str) -> str | None:
    """The last match of a regular expression: its first group, or all of it if it has none."""
    last = deque(re.finditer(pattern, text), maxlen=1)
    if not last:
        return None
    return last[0].group(1) if last[0].re.groups else last[0].group()


def place(text: str, where: Where, tag: str = "answer", pattern: str = "") -> str | None:
    """The part of the text that `where` names."""
    match where:
        case "all":
            return text
        case "last_line":
            return last_line(text)
        case "tag":
            return tagged(text, tag)
        case "boxed":
            return boxed(text)
        case "regex":
            return matched(text, pattern)
