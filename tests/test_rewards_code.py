"""The reward `code`: what is taken from an answer, what a row's tests may look like, how the jail scores it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkd.config.load import load
from rlkd.core.errors import ConfigError, PreflightError
from rlkd.core.types import Answer, Finish, Prompt
from rlkd.core.verdict import Outcome, Verdict
from rlkd.engines.jail import Jail
from rlkd.engines.sandbox import Found, Tier, probe
from rlkd.rewards.code import Case, Code, program
from rlkd.rewards.table import find, pack
from tests.rewards_help import prompt

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.stack  # processes in the sandbox that hang and are killed
sandboxed = pytest.mark.skipif(probe().tier is not Tier.SANDBOX, reason="no sandbox on this machine")


def row(tests: object, **more: object) -> Prompt:
    return Prompt("p7", np.zeros(3, np.int32), "", metadata={"tests": tests, **more})


def answers(*texts: str) -> list[Answer]:
    return [Answer(t, Finish.STOP, len(t)) for t in texts]


@pytest.fixture(scope="module")
def jails() -> Iterator[Any]:
    made: dict[str, Jail] = {}

    def judge(tests: object, *texts: str, metadata: dict[str, object] | None = None, **options: Any) -> list[Verdict]:
        key = repr(options)
        if key not in made:
            made[key] = Jail(pack({"code": find("code")(**options)}), timeout_s=120.0)
        return made[key].score(row(tests, **(metadata or {})), answers(*texts))

    yield judge
    for jail in made.values():
        jail.close()


def scores(verdicts: list[Verdict]) -> list[float | None]:
    assert not [v.failure for v in verdicts if v.failure is not None]
    return [v.scores["code"] for v in verdicts]


# --- the code in an answer


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print(1)", "print(1)"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nfirst\n```\nno, better\n```python\nsecond\n```\n```\noutput\n```", "second\n"),
        ("```\nplain\n```", "plain\n"),
        ("```cpp\nint x;\n```\n```py\nx\n```", "x\n"),
        ("<think>```python\nwrong\n```</think>\n```Python3\nright\n```", "right\n"),
        ("```python title=a\nx\n```", "x\n"),
        ("```python\ncut off", "cut off"),
        ("  ```python\n  x\n  ```", "  x\n"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_the_last_fenced_block(text: str, code: str) -> None:
    assert program(text).rstrip(" ") == code


@pytest.mark.faults("F35")
@pytest.mark.parametrize(
    "text", ["```" * 50_000, "```python\n" * 50_000, "`" * 200_000, "\n" * 200_000, "```\n" * 50_000]
)
def test_hostile_fences_take_no_time(text: str) -> None:
    program(text)


# --- the row's tests


@pytest.mark.parametrize(
    ("tests", "cases"),
    [
        (["assert f(1) == 2"], [Case("assert f(1) == 2")]),
        ("assert f(1) == 2", [Case("assert f(1) == 2")]),
        ([{"input": "1\n", "output": "2\n"}], [Case(stdin="1\n", stdout="2\n")]),
        ([{"stdin": 1, "expected_output": [2, 3]}], [Case(stdin="1", stdout="2\n3")]),
        ({"inputs": ["1"], "outputs": ["2"]}, [Case(stdin="1", stdout="2")]),
        ('{"inputs": [["1", "2"]], "outputs": ["3"]}', [Case(stdin="1\n2", stdout="3")]),
        ('["assert f(1) == 2"]', [Case("assert f(1) == 2")]),
        ("[f(x) for x in (1,)]", [Case("[f(x) for x in (1,)]")]),
    ],
)
def test_the_forms_of_tests(tests: object, cases: list[Case]) -> None:
    assert Code().cases(row(tests)) == cases


@pytest.mark.parametrize(
    "tests", [None, [], "", "  ", {}, 5, [5], [{}], [{"input": "1"}], {"inputs": [1], "outputs": []}]
)
def test_a_row_without_usable_tests_is_named(tests: object) -> None:
    with pytest.raises(ValueError, match="'p7'"):
        Code().cases(row(tests))


def test_human_eval_s_check_is_called() -> None:
    (case,) = Code().cases(row("def check(candidate):\n    assert candidate(1) == 2", entry_point="f"))
    assert case.test is not None
    assert case.test.endswith("\ncheck(f)")


# --- scored in the jail


@sandboxed
@pytest.mark.faults("F41")
def test_asserts(jails: Any) -> None:
    tests = ["assert f(1) == 2", "assert f(2) == 3"]
    right, half, wrong = "```python\ndef f(x):\n    return x + 1\n```", "def f(x): return 2", "def g(x): return 2"
    assert scores(jails(tests, right, half, wrong, "no code at all", "")) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(jails(tests, right, half, wrong, partial=True)) == [1.0, 0.5, 0.0]


@sandboxed
def test_a_setup_before_each_test(jails: Any) -> None:
    metadata = {"test_setup": ["import math", "half = 0.5"]}
    assert scores(jails(["assert math.isclose(f(1), half)"], "def f(x): return x / 2", metadata=metadata)) == [1.0]


@sandboxed
def test_input_and_output(jails: Any) -> None:
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]
    adds = "print(sum(map(int, input().split())))"
    assert scores(jails(tests, adds, "print(3)", f"{adds}\nraise SystemExit(1)", f"{adds}\nprint()")) == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]
    assert scores(jails(tests, adds, "print(3)", partial=True)) == [1.0, 0.5]
    assert scores(jails([{"input": "", "output": "1 2\n3"}], "print('1\\n2 3')", "print(1)", compare="words")) == [
        1.0,
        0.0,
    ]


@sandboxed
def test_calls_by_name(jails: Any) -> None:
    tests = {"inputs": [[1, 2], [[3], [4]]], "outputs": [3, [[3, 4]]], "fn_name": "add"}
    method = "class Solution:\n    def add(self, a, b): return a + b"
    assert scores(jails(tests, method, "def add(a, b): return a + b", "def add(a, b): return 3")) == [1.0, 1.0, 0.0]
    assert scores(jails({"inputs": [[2]], "outputs": [[2, 2]], "fn_name": "f"}, "def f(x): return x, x")) == [1.0]


@sandboxed
@pytest.mark.faults("F32", "F33", "F36", "F37")
def test_what_an_answer_does_to_itself_is_a_wrong_answer_and_no_failure(jails: Any) -> None:
    """Time, memory, a crash, output, an early end: the model's fault, scored 0, and its siblings are judged."""
    bad = [
        "while True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\n7**7**8",
        "x = bytearray(1 << 34)",
        "import ctypes\nctypes.string_at(0)",
        "while True: print('x' * 1000)",
        "import os\nos._exit(0)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "x = (",
        "def f(x):\n    return f(x)",
        "(" * 20_000,
        "\0",
        "\ud800",
    ]
    good = "def f(x): return x"
    for tests in (["assert f(1) == 1"], [{"input": "", "output": "1"}]):
        right = good if isinstance(tests[0], str) else "print(1)"
        verdicts = jails(tests, right, *bad, right, test_s=1.0, answer_s=1.5)
        assert scores(verdicts) == [1.0, *[0.0] * len(bad), 1.0]
        assert not any(v.retried for v in verdicts)


@sandboxed
def test_an_answer_s_time_is_limited_in_all(jails: Any) -> None:
    slow = "import time\ndef f(x):\n    time.sleep(0.5)\n    return x"
    (score,) = scores(jails(["assert f(1) == 1"] * 10, slow, partial=True, test_s=1.0, answer_s=2.0))
    assert score is not None
    assert 0.0 < score < 0.5


@sandboxed
def test_packages_only_if_asked_for(jails: Any) -> None:
    text = "import numpy as np\ndef f(x): return int(np.sum([x, x]))"
    assert scores(jails(["assert f(1) == 2"], text, answer_s=20.0, test_s=20.0)) == [0.0]
    assert scores(jails(["assert f(1) == 2"], text, packages=True, answer_s=20.0, test_s=20.0)) == [1.0]


@sandboxed
def test_a_row_at_fault_is_a_failure_and_no_score(jails: Any) -> None:
    (verdict,) = jails([], "def f(x): return x")
    assert verdict.outcome is Outcome.RAISED
    assert verdict.failure is not None
    assert "has no tests in its field 'tests'" in verdict.failure.headline


# --- where it may run


def test_it_does_not_run_outside_the_jail() -> None:
    with pytest.raises(RuntimeError, match="jail only"):
        find("code")().score(row(["assert True"]), answers("x = 1"))


@pytest.mark.faults("F41")
def test_the_jail_refuses_with_exit_3_and_runs_if_accepted(tmp_path: Path) -> None:
    """In the keeper's process, where Landlock is made to be missing by a reward module of its own."""
    poor = tmp_path / "poor.py"
    poor.write_text(
        "import sys\n"
        "from dataclasses import dataclass\n"
        "import rlkd.engines.sandbox_rules as rules\n"
        "from rlkd.engines.sandbox import Found, Tier\n"
        "from rlkd.rewards.code import Code\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Code):\n"
        "    pass\n"
        "if 'pytest' not in sys.modules:\n"
        "    rules.probe = lambda: Found(Tier.PROCESS, 'no Landlock here')\n"
    )
    rewards = pack({"code": find(f"{poor}:Mine")()})
    for least in ("userns+landlock", "process"):
        jail = Jail(rewards, min_tier=least)
        try:
            with pytest.raises(PreflightError, match="RLKD-E310") as caught:
                jail.start()
        finally:
            jail.close()
        assert caught.value.exit_code == 3
        assert "no Landlock here" in str(caught.value)
    jail = Jail(rewards, timeout_s=60.0, accept_unsafe_code=True)
    try:
        jail.start()
        assert jail.standing == {"tier": "process", "unsafe": True, "reason": "no Landlock here"}
        verdicts = jail.score(row(["assert f(1) == 1"]), answers("def f(x): return x", "def f(x): return 2"))
        assert scores(verdicts) == [1.0, 0.0]
    finally:
        jail.close()


@sandboxed
def test_the_jail_says_where_code_runs() -> None:
    for name, standing in (("code", {"tier": "userns+landlock", "unsafe": False, "reason": ""}), ("exact", None)):
        jail = Jail(pack({name: find(name)()}))
        try:
            jail.start()
            assert jail.standing == standing
        finally:
            jail.close()


def test_a_group_must_fit_into_the_verifier_s_time() -> None:
    recipe = str(ROOT / "configs/grpo-tiny.yaml")
    with pytest.raises(ConfigError) as caught:
        load(recipe, ["rewards={code: {}}"])
    assert "rewards.code may take" in str(caught.value)
    fix = re.search(r"verifier\.timeout_s=(\d+), or a smaller rewards\.code\.answer_s", str(caught.value))
    assert fix is not None
    load(recipe, ["rewards={code: {}}", f"verifier.timeout_s={fix[1]}"])


@pytest.mark.parametrize(("option", "value"), [("test_s", 0.0), ("answer_s", -1.0), ("memory_gib", 0.01)])
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option):
        find("code")(**{option: value})


def test_a_found_tier_is_comparable() -> None:
    assert Found(Tier.SANDBOX).tier.rank > Found(Tier.PROCESS).tier.rank
    assert prompt().metadata == {}
