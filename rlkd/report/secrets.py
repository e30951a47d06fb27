"""What must be in no file and on no screen: secrets, known by their values.

The values are those of environment variables that are named like a secret or that the recipe names (`key_env`), and
those that the recipe itself has under a key named like a secret. Every text that leaves the program passes `without`
(report/files.py, report/progress.py, the command line): wherever a value turns up, in an endpoint's error, a
traceback, a model's answer, its name stands in its place.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

SHORTEST = 8  # characters; anything shorter stands in too many texts by chance
NAMED_SECRET = re.compile(
    r"(?:^|[_-])(?:api[_-]?key|(?:access|private|secret|auth)[_-]key|secret|token|password|passwd|credentials?)$",
    re.IGNORECASE,
)  # of a recipe's keys
VARIABLE = re.compile(r"_KEY$|PASSWORD$|^AWS_", re.IGNORECASE)  # of environment variables, beside those
# Named like one, and none: a tokenizer's tokens, limits, where things are.
NO_SECRET = re.compile(
    r"(?:^|_)(?:bos|eos|pad|cls|sep|mask|unk|stop|end|start|special|max|min|num|memory)_tokens?$"
    r"|^AWS_(?:(?:DEFAULT_)?(?:REGION|OUTPUT|PROFILE)|ENDPOINT_URL.*|CA_BUNDLE|.*_FILE|.*_MODE|.*_ATTEMPTS)$",
    re.IGNORECASE,
)
REFERENCE = re.compile(r"\$\{.*\}|<.*>|\?\?\?|null|~", re.DOTALL)  # of a value that stands elsewhere, or nowhere
# `key: value`, `"key": "value"`, `key=value` in a line of yaml, json, or a command.
_PAIR = re.compile(
    r"""["']?(?P<key>[\w.-]+)["']?\s*[:=]\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<plain>[^\s"',{}\[\]]+))"""
)
_USER = re.compile(r"\w://[^/\s:@]*:([^/\s@]+)@")  # the password of a URL


def is_secret(key: str) -> bool:
    """Whether what a recipe calls so is a secret. Of a dotted key the last part counts."""
    last = key.rpartition(".")[2]
    return bool(NAMED_SECRET.search(last)) and not NO_SECRET.search(last)


class Secrets:
    """The values known so far, each with the name that takes its place."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # every way a value may be written -> its name
        self._any: re.Pattern[str] | None = None

    def add(self, name: str, value: str) -> None:
        """A secret. Too short a value, a reference to another, and a number below a million million are none."""
        value = value.strip()
        if len(value) < SHORTEST or REFERENCE.fullmatch(value) or (value.isdecimal() and len(value) < 12):
            return
        for written in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], quote(value, "")):
            self._names.setdefault(written, name)
        longest_first = sorted(self._names, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)))

    def learn_environment(self, environment: Mapping[str, str], named: Iterable[str] = ()) -> None:
        """Variables named like a secret, and those called `named`. The path of a file is no secret."""
        wanted = set(named)
        for name, value in environment.items():
            likely = (is_secret(name) or VARIABLE.search(name)) and not NO_SECRET.search(name)
            if name in wanted or (likely and not (os.path.isabs(value) and os.path.exists(value))):
                self.add(name, value)

    def learn_text(self, text: str) -> None:
        """What a recipe or a command line has under keys named like secrets, and passwords in URLs."""
        for key, value in pairs(text):
            if is_secret(key):
                self.add(key, value)
        for password in _USER.findall(text):
            self.add("password", password)

    def learn(self, thing: Any, key: str = "") -> None:
        """The same of nested dataclasses, mappings and lists."""
        if is_dataclass(thing) and not isinstance(thing, type):
            thing = {f.name: getattr(thing, f.name) for f in fields(thing)}
        if isinstance(thing, Mapping):
            for name, value in thing.items():
                self.learn(value, str(name))
        elif isinstance(thing, list | tuple):
            for value in thing:
                self.learn(value, key)
        elif isinstance(thing, str):
            if is_secret(key):
                self.add(key, thing)
            for password in _USER.findall(thing):
                self.add("password", password)

    def without(self, text: str) -> str:
        """The text with `<redacted:NAME>` for every secret in it."""
        if self._any is None:
            return text
        return self._any.sub(lambda found: f"<redacted:{self._names[found[0]]}>", text)


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """Keys and values written in a text."""
    for found in _PAIR.finditer(text):
        yield found["key"], found["double"] or found["single"] or found["plain"] or ""


KNOWN = Secrets()  # of this process: a secret is one for everybody who writes


def learn(environment: Mapping[str, str], recipe: str, overrides: Sequence[str] = ()) -> None:
    """What a command must not show, before its recipe is read: an error may show a line of it."""
    try:
        text = Path(recipe).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # reading it properly says what is wrong with it
        text = ""
    text = "\n".join([text, *overrides])
    KNOWN.learn_environment(environment, (value for key, value in pairs(text) if key.endswith("key_env")))
    KNOWN.learn_text(text)


def without(text: str) -> str:
    """The text without the secrets of this process."""
    return KNOWN.without(text)
