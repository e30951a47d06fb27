"""What `rlkd resume --prove` makes of two runs."""

from typing import Any

import pytest

from rlkd.prove import compared


def twin(**changes: Any) -> dict[str, Any]:
    row = {"loss": 0.1, "grad_norm": 1.0, "batch/reward": 0.5, "batch/tokens": 100, "entropy": 2.0}
    found: dict[str, Any] = {"ledger": {4: [[0, "p", 1, "trained", 4]]}, "rows": {4: row}, "weights": "w"}
    for key, value in changes.items():
        found[key] = {4: {**row, **value}} if key == "rows" else value
    return found


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "L4"),
        ({"weights": "other"}, "L3"),
        ({"rows": {"batch/reward": 0.25}}, "L3"),
        ({"rows": {"loss": 0.1 + 2e-17}}, "L2"),
        ({"ledger": {4: [[0, "q", 1, "trained", 4]]}}, "L1"),
        ({"ledger": {}}, "L1"),
    ],
)
def test_the_level_is_that_of_the_first_difference(changes: dict[str, Any], level: str) -> None:
    found = compared(3, 1, twin(), twin(**changes))
    assert found["level"] == level
    assert f"level {level}" in found["text"]
