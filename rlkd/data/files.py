"""Rows of files: jsonl, parquet, a Hugging Face dataset folder. Read as they are asked for, never whole."""

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlkd.core.errors import DataError, nearest
from rlkd.data.rows import BadRow, Columns, Row, shown

BATCH = 1024  # rows read at once from a columnar file
NEAREST = 3

# What people hand over for jsonl, by its first bytes.
_NOT_JSONL = {
    b"[": ("one JSON array, not one object a line", "jq -c '.[]' FILE > rows.jsonl"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"\x1f\x8b": ("compressed by gzip", "gunzip it first"),
    b"PAR1": ("a parquet file", "say kind: parquet"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "git lfs pull"),
}
_BOM = b"\xef\xbb\xbf"


def suggestion(path: Path) -> str | None:
    """The existing names nearest to a path that does not exist, in the last folder of it that does."""
    folder, wanted = path.parent, path.name
    while not os.path.isdir(folder) and folder != folder.parent:
        folder, wanted = folder.parent, folder.name
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return None
    close = difflib.get_close_matches(wanted, names, n=NEAREST, cutoff=0.4)
    if not close:
        return f"{folder} holds nothing of a similar name"
    return "did you mean " + " or ".join(f"`{folder / name}`" for name in close) + "?"


def check_file(path: Path) -> None:
    """Raises DataError unless `path` is a file that can be opened."""
    if not os.path.exists(path):  # Path.exists raises for some names that cannot exist
        raise DataError("RLKD-D101", "no such file", where=str(path), fix=suggestion(path))
    if os.path.isdir(path):
        raise DataError("RLKD-D102", "a folder, not a file", str(path), "give a file, or say kind: huggingface")
    try:
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return DataError(
        "RLKD-D103", f"cannot be read: {first}", where=str(path), fix="is the file whole, and of its kind?"
    )


def jsonl(path: Path) -> Iterator[Row | BadRow]:
    """One JSON object a line, UTF-8. Blank lines are passed over. Raises DataError for what is no such file."""
    check_file(path)
    try:
        with path.open("rb") as file:
            _check_head(path, file.read(64))
            file.seek(0)
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield _json_row(number, f"{path}:{number}", line)
    except OSError as error:
        raise unreadable(path, error) from error


def _check_head(path: Path, head: bytes) -> None:
    for start, (what, fix) in _NOT_JSONL.items():
        if head.removeprefix(_BOM).lstrip().startswith(start):
            raise DataError("RLKD-D104", f"is {what}", where=str(path), fix=fix)


class _Repeated(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python would take the last of two fields of one name, and not say so."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in found if names.count(name) > 1))
    return found


def _json_row(number: int, where: str, line: bytes) -> Row | BadRow:
    text = ""
    try:
        text = line.decode("utf-8").strip()
        value = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return BadRow(where, "not UTF-8", f"byte {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(where, "not JSON", f"not JSON: {error.msg} at character {error.colno}: {shown(text)}")
    except _Repeated as repeated:
        return BadRow(where, "repeated field", f"the field {shown(repeated.key)} is there twice")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        return BadRow(where, "not JSON", f"not JSON that can be read: {str(error)[:80]}")
    if not isinstance(value, dict):
        return BadRow(where, "not an object", f"not a JSON object, but {shown(value)}")
    return Row(number, where, value)


def parquet(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """Raises DataError for a file that is not parquet, or lacks a column that is asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_file(path)
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    with file:
        _check_columns(list(file.schema_arrow.names), columns, str(path))
        batches = file.iter_batches(batch_size=BATCH)
        yield from _arrow_rows(batches, path)


def huggingface(path: Path, split: str, columns: Columns) -> Iterator[Row | BadRow]:
    """A folder written by `save_to_disk`: one dataset, or several splits of which `split` is read.

    Raises DataError if the folder is missing or something else, or has no such split or column.
    """
    import datasets
    import pyarrow as pa

    if not os.path.isdir(path):
        raise DataError(
            "RLKD-D101",
            "no such dataset folder",
            where=str(path),
            fix="; ".join(filter(None, [suggestion(path), "datasets are read from disk: write one with save_to_disk"])),
        )
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    if isinstance(loaded, datasets.DatasetDict):
        _check_split(split, [str(name) for name in loaded], path)
        loaded, path = loaded[split], path / split
    else:
        _check_split(split, [str(loaded.split or "train")], path)
    _check_columns(list(loaded.column_names), columns, str(path))
    tables = loaded.with_format("arrow").iter(batch_size=BATCH)
    yield from _arrow_rows((batch for table in tables for batch in table.to_batches()), path)


def _check_split(split: str, splits: list[str], path: Path) -> None:
    if split not in splits:
        close = nearest(split, splits)
        fix = f"did you mean `{close}`?" if close else "set `split` of the data source"
        raise DataError("RLKD-D105", f"no split `{split}`; its splits: {', '.join(splits) or 'none'}", str(path), fix)


def _check_columns(names: list[str], columns: Columns, where: str) -> None:
    needed = {"prompt": columns.prompt, "answer": columns.answer, "demonstrations": columns.demonstrations}
    for setting, column in needed.items():
        if column is not None and column not in names:
            close = nearest(column, names)
            raise DataError(
                "RLKD-D106",
                f"no column `{column}`; its columns: {', '.join(names) or 'none'}",
                where=where,
                fix=(f"did you mean `{close}`? " if close else "") + f"say `{setting}: NAME` in the data source",
            )
    for name in filter(None, (*needed.values(), columns.id)):
        if names.count(name) > 1:
            raise DataError("RLKD-D106", f"{names.count(name)} columns are called `{name}`", where, "keep one of them")


def _arrow_rows(batches: Iterator[Any], path: Path) -> Iterator[Row | BadRow]:
    """Rows of pyarrow record batches, numbered from 1. A value that does not become Python spoils its row alone."""
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                where = f"{path}: row {number}"
                try:
                    values = {name: batch.column(k)[i].as_py() for k, name in enumerate(batch.schema.names)}
                except (ValueError, OverflowError, ImportError, pa.ArrowException) as error:
                    yield BadRow(where, "value cannot be read", f"a value cannot be read: {str(error)[:80]}")
                    continue
                yield Row(number, where, values)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
