"""Where each key of a recipe was written, and the problems found there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlkd.core.errors import ConfigError, Problem, nearest

COMMAND_LINE, UNWRITTEN = 10**6, 10**6 + 1  # instead of a file's number: their problems come after the files'
WIDEST = 120  # characters of a line that an excerpt shows


@dataclass(frozen=True)
class Place:
    """A key or value in a file (`grpo.yaml:14:3`) or on the command line (`command line: a.b=c`)."""

    where: str
    order: tuple[int, int, int] = (0, 0, 0)  # file, line, column: problems are listed in this order
    excerpt: str | None = None

    @property
    def on_command_line(self) -> bool:
        return self.order[0] == COMMAND_LINE

    @classmethod
    def in_file(cls, path: str, lines: Sequence[str], line: int, column: int, width: int, order: int) -> "Place":
        """A place `width` characters wide; line and column count from 0, and from 1 in what people see."""
        source = lines[line] if line < len(lines) else ""
        start = max(0, column - WIDEST // 2) if len(source) > WIDEST else 0
        shown = source[start : start + WIDEST]
        margin = "".join("\t" if c == "\t" else " " for c in shown[: column - start])
        carets = "^" * max(1, min(width, WIDEST // 2, len(source) - column))
        gutter = " " * len(str(line + 1))
        excerpt = f"{gutter} |\n{line + 1} | {shown}\n{gutter} | {margin}{carets}"
        return cls(f"{path}:{line + 1}:{column + 1}", (order, line, column), excerpt)


@dataclass(frozen=True)
class Entry:
    """What a recipe says under one key: a section, a list of entries, or a plain value."""

    place: Place
    value: "dict[str, Entry] | list[Entry] | str | int | float | bool | None"
    text: str | None = None  # a plain value as it was written

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def texts(self, path: str) -> dict[str, str]:
        """The texts within, by dotted key; `path` is the key of this entry."""
        if isinstance(self.value, str):
            return {path: self.value}
        inner: Iterable[tuple[str | int, Entry]] = self.value.items() if isinstance(self.value, dict) else ()
        if isinstance(self.value, list):
            inner = enumerate(self.value)
        return {p: text for key, entry in inner for p, text in entry.texts(f"{path}.{key}").items()}

    def shown(self) -> str:
        """The value for a message, in a few words."""
        if isinstance(self.value, dict):
            return "a section" if self.value else "an empty section"
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}" if self.value else "an empty list"
        text = str(self.value) if self.text is None else self.text
        return "nothing" if not text else f"`{text}`" if len(text) <= 60 else f"`{text[:60]}…`"


class Found:
    """Collects problems, so that all are reported at once, in the order of their places."""

    def __init__(self) -> None:
        self._problems: list[tuple[tuple[int, int, int], Problem]] = []

    def add(self, code: str, what: str, place: Place, fix: str | None = None) -> None:
        self.put(Problem(code, what, fix=fix), place)

    def put(self, problem: Problem, place: Place) -> None:
        """A problem that somebody else found, at a place that we know."""
        self._problems.append((place.order, replace(problem, where=place.where, excerpt=place.excerpt)))

    def codes(self) -> set[str]:
        return {problem.code for _, problem in self._problems}

    def stop_if_any(self) -> None:
        """ConfigError with every problem so far, each of them once."""
        if self._problems:
            in_order = sorted(self._problems, key=lambda p: p[0])
            raise ConfigError.of(list(dict.fromkeys(problem for _, problem in in_order)))


def one_edit_apart(a: str, b: str) -> bool:
    """Whether a letter inserted, left out, changed, or swapped with its neighbour makes the one of the other."""
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    short, long = sorted((a, b), key=len)
    i = next((i for i, (x, y) in enumerate(zip(short, long, strict=False)) if x != y), len(short))
    if len(short) < len(long):
        return short[i:] == long[i + 1 :]
    swapped = short[i : i + 2] == long[i : i + 2][::-1] and short[i + 2 :] == long[i + 2 :]
    return swapped or short[i + 1 :] == long[i + 1 :]


def similar(word: str, known: Sequence[str]) -> list[str]:
    """What was probably meant: all one edit away, else the closest one, else none."""
    near = [k for k in known if one_edit_apart(word, k)]
    if near:
        return near
    close = nearest(word, known)
    return [close] if close else []


def did_you_mean(candidates: Sequence[str]) -> str:
    return "did you mean " + " or ".join(f"`{c}`" for c in candidates) + "?" if candidates else ""
