"""Every recipe of configs/ loads; every other file there is used by one of them."""

from pathlib import Path

import pytest
import yaml

from rlkd.config.load import load, resolved
from rlkd.config.schema import Config

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RECIPES = [p for p in FILES if p.parent == CONFIGS and not p.name.startswith("base")]


def used(path: Path) -> set[Path]:
    """The files that a recipe's `defaults` name, and theirs."""
    names = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    files = {(path.parent / f"{name}.yaml").resolve() for name in names}
    return files.union(*(used(f) for f in files))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_loads(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert isinstance(config, Config)
    assert config.name == path.stem  # a run is called as its recipe, unless told otherwise
    again = tmp_path / "config.yaml"
    again.write_text(resolved(config), encoding="utf-8")
    assert load(again) == config


def test_no_file_is_idle() -> None:
    named = set().union(*(used(p) for p in RECIPES))
    assert [p for p in FILES if p not in RECIPES and p.resolve() not in named] == []
