"""Where rows come from. `config.schema.Source` has the shape of `SourceSettings`; data does not import config."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from rlkd.core.errors import ConfigError
from rlkd.data import files, generators
from rlkd.data.rows import BadRow, Columns, Row

Kind = Literal["jsonl", "parquet", "huggingface", "reasoning_gym", "arithmetic"]


@runtime_checkable
class SourceSettings(Protocol):
    """See `rlkd.config.schema.Source`."""

    @property
    def kind(self) -> Kind: ...
    @property
    def path(self) -> str: ...  # a file, a folder, or a task's name
    @property
    def size(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def split(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def demonstrations(self) -> str | None: ...  # a column
    @property
    def traces(self) -> str | None: ...  # a file


@dataclass(frozen=True)
class Opened:
    """A source's rows, made or read while they are iterated over (once)."""

    name: str  # what Prompt.source and the ids of numbered rows say
    columns: Columns
    rows: Iterable[Row | BadRow]


def opened(source: SourceSettings, setting: str = "data.train") -> Opened:
    """The source's rows, at most `source.size` of them; `setting` is how messages about the settings call it.

    Raises ConfigError for settings that make no sense; iterating raises DataError.
    """
    if source.size is not None and source.size < 1:
        raise ConfigError("RLKD-C401", f"size must be at least 1, not {source.size}", f"{setting}.size")
    if source.kind in ("reasoning_gym", "arithmetic"):
        return _generated(source, setting)
    if not source.path:
        raise ConfigError("RLKD-C402", "no path given", f"{setting}.path", "name the file or folder with the prompts")
    path = Path(os.path.expanduser(source.path))
    columns = Columns(source.prompt, source.answer, source.id, source.demonstrations)
    rows: Iterable[Row | BadRow]
    if source.kind == "jsonl":
        rows = files.jsonl(path)
    elif source.kind == "parquet":
        rows = files.parquet(path, columns)
    else:
        rows = files.huggingface(path, source.split, columns)
    return Opened(path.name, columns, islice(rows, source.size))


def _generated(source: SourceSettings, setting: str) -> Opened:
    if source.size is None:
        raise ConfigError("RLKD-C403", "a generator needs to know how many rows to make", f"{setting}.size")
    if source.demonstrations is not None:
        raise ConfigError(
            "RLKD-C411",
            f"the generator {source.kind} has no columns, and so none with demonstrations",
            f"{setting}.demonstrations",
            "leave it out; `traces` names a file of them, and arithmetic writes its own: options: {demonstrations: 1}",
        )
    if source.kind == "arithmetic":
        rows = generators.arithmetic(source.split, source.size, source.seed, source.options)
        helped = Columns(demonstrations="demonstrations" if source.options.get("demonstrations") else None)
        return Opened(f"arithmetic-{source.split}", helped, rows)
    rows = generators.reasoning_gym(source.path, source.size, source.seed, source.options)
    return Opened(source.path, Columns(), rows)
