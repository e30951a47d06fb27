"""An error code means one thing: every code that the source says has one row in rlkd/errors.md, which names the files
that say it. So a code that is taken for something else in another file is seen when its row is read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rlkd
from rlkd import cli, explain
from rlkd.core import errors

ROOT = Path(rlkd.__file__).parent
CODE = re.compile(r"RLKD-[A-Z]\d{3}")
KINDS = {name: c for name, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.RlkdError)}


def said(source: str) -> set[str]:
    """The codes that a file says: not those of docstrings, nor those it compares with or keeps in a set."""
    tree, passed = ast.parse(source), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.Set) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            passed |= {id(inner) for inner in ast.walk(node)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in passed]
    return {code for n in constants if isinstance(n.value, str) for code in CODE.findall(n.value)}


def raised(source: str) -> Iterator[tuple[str, str]]:
    """(class, code) of every error that is made by a class of core/errors.py."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and CODE.fullmatch(first.value):
                yield node.func.id, first.value


def sources() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(ROOT.rglob("*.py"))}


def test_what_counts_as_said() -> None:
    source = '''"""RLKD-C900"""
x = {"RLKD-C901", "RLKD-C902"}
if y == "RLKD-C903" or "RLKD-C904" in y:
    raise Error("RLKD-C905")
print(f"error[RLKD-C906]: {y}")
'''
    assert said(source) == {"RLKD-C905", "RLKD-C906"}


def test_every_code_has_a_row_which_names_the_files_that_say_it() -> None:
    found: dict[str, set[str]] = {}
    for path, source in sources().items():
        for code in said(source):
            found.setdefault(code, set()).add(path)
    known = explain.table()
    assert sorted(found) == list(known), "rlkd/errors.md has a row for every code, in their order, and no other"
    for code, paths in found.items():
        assert set(known[code].said_by) == paths, f"{code}: does it mean “{known[code].means}” in each of these?"


def test_no_row_is_there_twice_and_none_is_passed_over() -> None:
    lines = [line for line in explain.TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| RLKD-")]
    assert len(lines) == len(explain.table())
    meanings = [m.means for m in explain.table().values()]
    assert len(meanings) == len(set(meanings)), "two codes for one thing"


def test_the_letter_says_the_exit_code() -> None:
    for path, source in sources().items():
        for name, code in raised(source):
            kind, letter = KINDS[name], code[5]
            assert issubclass(kind, explain.KINDS[letter]), f"{path}: {name}({code})"
            if kind.exit_code != explain.KINDS[letter].exit_code:
                assert f"exit {kind.exit_code}" in explain.table()[code].means, code


def rlkd_explain(*words: str) -> str:
    done = CliRunner().invoke(cli.app, ["explain", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("word", ["RLKD-K012", "rlkd-k012", "K012", "k012"])
def test_explain_a_code(word: str) -> None:
    assert rlkd_explain(word) == (
        "RLKD-K012: there is no whole checkpoint of this step\n"
        "  what to do: take one of those that are listed\n"
        "  exit code 7: No checkpoint can be loaded where one is asked for\n"
        "  in: rlkd/ckpt.py, rlkd/store/folder.py\n"
    )


def test_explain_lists_all() -> None:
    lines = rlkd_explain().splitlines()
    assert len(lines) == len(explain.table())
    assert "RLKD-E160  exit 3  another process works in this folder" in lines


def test_explain_as_json() -> None:
    import json

    assert json.loads(rlkd_explain("T142", "--json"))["exit_code"] == errors.DIVERGED
    assert len(json.loads(rlkd_explain("--json"))["codes"]) == len(explain.table())


@pytest.mark.parametrize(("word", "told"), [("RLKD-K112", "did you mean RLKD-K"), ("", "`rlkd explain` lists all")])
def test_an_unknown_code(word: str, told: str) -> None:
    done = CliRunner().invoke(cli.app, ["explain", word])
    assert done.exit_code == errors.USAGE
    assert "RLKD-C415" in done.stderr
    assert told in done.stderr
