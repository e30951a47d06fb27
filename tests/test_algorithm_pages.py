"""docs/algorithms.md and its pages: one for every method, none for others, and what they show loads."""

import re
from pathlib import Path

import pytest

from rlkd.algorithms import TABLE
from rlkd.config.stages import load

ROOT = Path(__file__).parent.parent
INDEX = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs" / "algorithms").glob("*.md"))
FRAGMENT = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
PATH = re.compile(r"`((?:configs|rlkd|docs|benchmarks)/[\w./-]+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def test_every_method_has_a_page_and_a_row() -> None:
    assert [p.stem for p in PAGES] == sorted(TABLE)
    rows = re.findall(r"^\| \[`(\w+)`\]\(algorithms/(\w+)\.md\) \|", INDEX, re.MULTILINE)
    assert sorted(rows) == [(name, name) for name in sorted(TABLE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_its_fragments_load_over_its_tiny_recipe(page: Path, tmp_path: Path) -> None:
    base = ROOT / "configs" / f"{page.stem.replace('_', '-')}-tiny"
    fragments = FRAGMENT.findall(page.read_text(encoding="utf-8"))
    assert fragments
    for fragment in fragments:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"defaults: [{base}]\n{fragment}", encoding="utf-8")
        [stage] = load(path)
        assert stage.config.algorithm.name == page.stem


@pytest.mark.parametrize("page", [ROOT / "docs" / "algorithms.md", *PAGES], ids=lambda p: p.stem)
def test_files_that_it_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [name for name in PATH.findall(text) if "NAME" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in LINK.findall(text) if not (page.parent / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_it_says_when_what_it_costs_and_its_traps(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in (r"\*\*When\.\*\*", r"\*\*(What it costs|Cost)\.\*\*", r"\*\*Traps\.?\*\*"):
        assert re.search(part, text), part
