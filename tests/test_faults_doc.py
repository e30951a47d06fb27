"""docs/faults.md has every fault of the matrix once, and names tests that are there and are marked with it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (F\d+) \|(.*)\|(.*)\|(.*)\|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def marked() -> dict[tuple[str, str], set[str]]:
    """(file, test) -> the faults it is marked with."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in functions:
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.faults":
                    numbers = {str(ast.literal_eval(a)) for a in mark.args}
                    found.setdefault((str(path.relative_to(ROOT)), function.name), set()).update(numbers)
    return found


def rows() -> dict[str, tuple[str, str]]:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    found = ROW.findall(text)
    assert len(found) == len({number for number, *_ in found}), "a fault has two rows"
    return {number: (does, tests) for number, _, does, tests in found}


def test_every_fault_has_a_row_with_a_test_or_a_reason() -> None:
    assert list(rows()) == [f"F{i}" for i in range(1, 71)]
    for number, (does, tests) in rows().items():
        assert len(does.strip()) > 10, number
        assert TEST.search(tests) or tests.strip().startswith("no test:"), number


def test_the_tests_are_there_and_marked() -> None:
    marks = marked()
    for number, (_, tests) in rows().items():
        for file, name in TEST.findall(tests):
            assert number in marks.get((file, name), set()), f"{number}: {file}::{name}"


def test_a_mark_is_a_fault_of_the_table() -> None:
    known = set(rows())
    assert not {n for numbers in marked().values() for n in numbers} - known
