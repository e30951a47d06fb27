"""Templates (templates/*) filled in. Every value is put in as data: `| q` in yaml, `| sh` in a shell."""

import functools
import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def quoted(value: Any) -> str:
    """A yaml scalar: JSON's strings are yaml's."""
    return json.dumps(value, ensure_ascii=False)


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    made.filters["q"] = quoted
    made.filters["sh"] = lambda value: shlex.quote(str(value))
    return made


def fill(template: str, **values: Any) -> str:
    """The template's text; an unknown name in it is an error."""
    return _environment().get_template(template).render(**values)
