"""Every setting, misspelt by one edit, is an error that names the right one (F61)."""

import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlkd.config import kinds
from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.core.errors import ConfigError

RECIPE = """\
model: {path: models/tiny}
algorithm: {name: grpo}
data: {train: {kind: arithmetic, size: 1000}}
rewards: {arithmetic: {}}
evaluate: {at_start: false, at_end: false}
"""


def keys(cls: type[Any] = Config, at: str = "") -> Iterator[str]:
    """Every dotted key of the schema whose name can be misspelt."""
    for name, hint in kinds.settings(cls).items():
        section = kinds.section_of(hint)
        if section is not None:
            yield from keys(section, f"{at}{name}.")
        elif name not in ("algorithm", "rewards", "teachers", "options"):
            yield at + name


KEYS = sorted(set(keys()))


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str]:
    """A key, and the same with one letter left out, put in, or replaced."""
    key = draw(st.sampled_from(KEYS))
    section, _, name = key.rpartition(".")
    place = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase))
    kind = draw(st.sampled_from(("without", "more", "other")))
    rest = name[place + (kind != "more") :]
    wrong = name[:place] + (letter if kind != "without" else "") + rest
    prefix = f"{section}." if section else ""
    assume(wrong and prefix + wrong not in KEYS and wrong != name)
    return key, prefix + wrong


FUZZ = int(os.environ.get("RLKD_FUZZ", "15"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("typos") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.faults("F61")
@settings(
    max_examples=int(os.environ.get("RLKD_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(misspelt())
def test_one_edit_is_caught_and_the_right_key_is_named(recipe: Path, keys: tuple[str, str]) -> None:
    right, wrong = keys
    with pytest.raises(ConfigError) as caught:
        load(recipe, [f"{wrong}=1"])
    codes = {p.code for p in caught.value.problems}
    assert codes & {"RLKD-C002", "RLKD-C008"}, str(caught.value)
    assert wrong.rpartition(".")[2] in str(caught.value)
    told = str(caught.value)
    assert right.rpartition(".")[2] in told or "did you mean" in told or "known here" in told, told


def test_there_is_something_to_misspell(recipe: Path) -> None:
    assert len(KEYS) > 100
    load(recipe, ["preempt.lease_s=30"])  # the right ones are no errors
