"""Whether a checkpoint is of the run that wants to go on with it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlkd.core.errors import CheckpointError

MISSING = "—"  # a key that only one side has
WIDEST = 60  # characters of a value shown


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Dotted key, value in the checkpoint, value of this run, for each that differs; as text, shortened."""
    a, b = dict(_flat(saved)), dict(_flat(here))
    return [
        (key, _shown(a, key), _shown(b, key))
        for key in sorted({*a, *b})
        if key not in a or key not in b or a[key] != b[key]
    ]


def refuse_difference(saved: Mapping[str, Any], here: Mapping[str, Any], where: str, fix: str) -> None:
    """CheckpointError RLKD-K016 with a table of what differs, if anything does. Both as json gives them back."""
    rows = differences(saved, here)
    if not rows:
        return
    table = [("", "checkpoint", "this run"), *rows]
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    lines = [f"{key:<{widths[0]}}  {old:<{widths[1]}}  {new}" for key, old, new in table]
    what = "the checkpoint is of another run\n    " + "\n    ".join(lines)
    raise CheckpointError("RLKD-K016", what, where=where, fix=fix)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = str(values[key]) if key in values else MISSING
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
