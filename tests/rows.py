"""Rows and files of rows for tests of data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkd.config.schema import Source
from rlkd.data import Rules
from tests.small_tokenizers import wrapped

TOKENIZER = wrapped()
PLAIN = Rules(max_prompt_tokens=1000, chat=False)


def lines(path: Path, rows: Sequence[Any]) -> Source:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Source(path=str(path))


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "answer": str(i), **more}
