"""One row of a source: from whatever is in it to a question with an answer, or to why not."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from rlkd.core.errors import nearest

DEEPEST = 64  # levels of nesting in metadata; deeper rows cannot be pickled
SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Columns:
    """Which fields of a row mean what."""

    prompt: str = "prompt"
    answer: str = "answer"
    id: str = "id"
    demonstrations: str | None = None  # None: rows have none


@dataclass(frozen=True)
class Row:
    """A record as it came. `where` is what a message calls it; `number` counts from 1 (lines, in a text file)."""

    number: int
    where: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class BadRow:
    """A record that cannot be used. `reason` is short and the same for all of its kind; `what` speaks of this one."""

    where: str
    reason: str
    what: str
    fix: str | None = None


@dataclass(frozen=True)
class Worked:
    """A worked answer as text: a demonstration, not yet tokenised. `where` is what a message calls it."""

    teacher: str
    text: str
    where: str
    quality: float = math.nan


@dataclass(frozen=True)
class Question:
    """A usable row, not yet tokenised. `messages` is None for a plain string."""

    where: str
    id: str
    text: str
    messages: tuple[Mapping[str, str], ...] | None
    answer: str
    metadata: Mapping[str, object] = field(default_factory=dict)
    digest: bytes = b""  # of answer and metadata
    numbered: bool = False  # its id was made here
    demonstrations: tuple[Worked, ...] = ()


class _Wrong(Exception):
    """Why a row cannot be used."""

    def __init__(self, reason: str, what: str, fix: str | None = None) -> None:
        self.reason, self.what, self.fix = reason, what, fix


def question(row: Row, columns: Columns, source: str) -> Question | BadRow:
    """The row's question; a row without an id is called `<source>:<number>`."""
    try:
        text, messages = _prompt(_value(row, columns.prompt, "prompt"))
        answer = _answer(_value(row, columns.answer, "answer"))
        given = _id(row.values.get(columns.id))
        helped = () if columns.demonstrations is None else _worked(row.values.get(columns.demonstrations), row.where)
        used = {columns.prompt, columns.answer, columns.id, columns.demonstrations}
        metadata = {name: value for name, value in row.values.items() if name not in used}
        digest = _digest(answer, metadata)
    except _Wrong as wrong:
        return BadRow(row.where, wrong.reason, wrong.what, wrong.fix)
    name = f"{source}:{row.number}" if given is None else given
    return Question(row.where, name, text, messages, answer, metadata, digest, given is None, helped)


def trace(row: Row) -> tuple[str, Worked] | BadRow:
    """A row of a file of traces: the prompt's id, and a worked answer to it."""
    try:
        name = _id(row.values.get("id"))
        if name is None:
            raise _Wrong("no 'id'", "a trace must say which prompt it is of: no field 'id'")
        return name, _demonstration(row.values, "the trace", row.where)
    except _Wrong as wrong:
        return BadRow(row.where, wrong.reason, wrong.what, wrong.fix)


def shown(value: object) -> str:
    """A value in a message: its beginning, on one line."""
    text = repr(value[:SHOWN]) if isinstance(value, str | bytes) else type(value).__name__
    if isinstance(value, int | float | Decimal):
        text = f"{value!s:.{SHOWN}}"
    return text + ("…" if isinstance(value, str | bytes) and len(value) > SHOWN else "")


def _printable(text: str) -> str:
    """The text's beginning, without half characters, which no terminal takes."""
    return text[: 2 * SHOWN].encode("utf-8", "backslashreplace").decode()


def _value(row: Row, column: str, setting: str) -> object:
    if column not in row.values:
        names = [_printable(str(name)) for name in row.values]
        close = nearest(column, names)
        raise _Wrong(
            f"no {column!r}",
            f"no field {column!r}; it has {_printable(', '.join(names)) or 'none'}",
            f"say which field it is: {setting}={close or '…'} under the data source",
        )
    value = row.values[column]
    if value is None:
        raise _Wrong(f"{column!r} is null", f"{column!r} is null")
    return value


def _prompt(value: object) -> tuple[str, tuple[Mapping[str, str], ...] | None]:
    """The question for people, and the messages if the row holds a conversation."""
    if isinstance(value, str):
        return _text(value, "the prompt"), None
    if not isinstance(value, list) or not value:
        raise _Wrong(
            "prompt of a wrong type", f"the prompt must be a string or a list of chat messages, not {shown(value)}"
        )
    messages = tuple(_message(message, i) for i, message in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise _Wrong("ends in an answer", "the last message is the assistant's: the model would have nothing to answer")
    return messages[-1]["content"], messages


def _message(value: object, index: int) -> Mapping[str, str]:
    """Role, content and whatever other text a template may use. Fields that are null are as good as absent."""
    where = f"message {index + 1}"
    if not isinstance(value, dict):
        raise _Wrong("bad chat message", f"{where} must have role and content, but is {shown(value)}")
    kept = {key: item for key, item in value.items() if item is not None}
    for key in ("role", "content"):
        if key not in kept:
            raise _Wrong("bad chat message", f"{where} has no {key!r}")
    for key, item in kept.items():
        if not isinstance(key, str) or not isinstance(item, str):
            raise _Wrong("bad chat message", f"{where}: {key!r} must be text, not {shown(item)}")
        _text(item, f"{where}: {key!r}", blank=key != "role" and kept["role"] != "user")
    return kept


def _text(value: str, what: str, blank: bool = False) -> str:
    """`value` itself, if it can be tokenised (a lone surrogate cannot) and is not blank."""
    if not blank and not value.strip():
        raise _Wrong("empty text", f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Wrong(
            "not Unicode text", f"{what} holds half a character (a lone surrogate) at {error.start}"
        ) from error
    return value


def _answer(value: object) -> str:
    """Text as it is; 42 and 42.0 are both "42", since a column of whole numbers with gaps becomes floats."""
    if isinstance(value, str):
        return _text(value, "the answer", blank=True)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise _Wrong("answer of a wrong type", f"the answer must be text or a number, not {shown(value)}")
    if not isinstance(value, int) and not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
        raise _Wrong("answer of a wrong type", f"the answer is {value}")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


UNNAMED = "data"  # the teacher of a demonstration that does not name one
# A demonstration's fields, by rlkd's name and by those of the data sets that LUFFY and AMPO were published with.
_FIELDS = {"text": ("text", "content"), "teacher": ("teacher", "source"), "quality": ("quality", "quality_score")}


def _worked(value: object, where: str) -> tuple[Worked, ...]:
    """A text, a record, or a list of such; null is none."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_demonstration(item, f"demonstration {i}", where) for i, item in enumerate(items, start=1))


def _demonstration(item: object, what: str, where: str) -> Worked:
    if isinstance(item, str):
        return Worked(UNNAMED, _text(item, what), where)
    if not isinstance(item, Mapping):
        raise _Wrong("bad demonstration", f"{what} must be a text or a record with a 'text', but is {shown(item)}")
    text, teacher, quality = (
        next((item[name] for name in names if item.get(name) is not None), None) for names in _FIELDS.values()
    )
    if not isinstance(text, str):
        found = "has no 'text'" if text is None else f"its text is {shown(text)}"
        raise _Wrong("bad demonstration", f"{what}: {found}", "give {teacher, text, quality}")
    if not isinstance(teacher, str | None):
        raise _Wrong("bad demonstration", f"{what}: its teacher must be a name, not {shown(teacher)}")
    if isinstance(quality, bool) or not isinstance(quality, int | float | Decimal | None):
        raise _Wrong("bad demonstration", f"{what}: its quality must be a number, not {shown(quality)}")
    known = math.nan if quality is None else float(quality)
    return Worked(_text(teacher or UNNAMED, what), _text(text, what), where, known)


def _id(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Wrong("id of a wrong type", f"the id must be text or a whole number, not {shown(value)}")
    return _text(str(value), "the id")


def _digest(answer: str, metadata: Mapping[str, object]) -> bytes:
    if _depth(metadata) > DEEPEST:
        raise _Wrong("nested too deeply", f"a field is nested more than {DEEPEST} levels deep")
    return hashlib.blake2b(repr((answer, metadata)).encode(), digest_size=16).digest()


def _depth(value: object) -> int:
    """Levels of containers, level by level: Python's own recursion would give out on what this must find."""
    level, depth = [value], -1
    while level and depth <= DEEPEST:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
    return depth
