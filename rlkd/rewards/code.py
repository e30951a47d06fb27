r"""Does the program the model wrote pass the row's tests?

The row's field `tests` (an option) is one of

    ["assert f(1) == 2", …]                               each a test; or one text, with `check(candidate)` of the
                                                          row's `entry_point` called if it defines that (HumanEval)
    [{"input": "1 2\n", "output": "3\n"}, …]              standard input and output, each a run of the program
    {"inputs": […], "outputs": […], "fn_name": "f"}       calls; without fn_name, input and output (APPS)

or JSON of that. `test_setup` (an option too: a field of the row, if it has it) runs before each test.

The program runs in the verifier's sandbox (rlkd/engines/sandbox.py), never in this process. Outputs are compared here,
where the program cannot reach; asserts run in a process of the sandbox that the program is not in: it is called from
there, and only plain data comes back (rlkd/engines/sandbox_peer.py). So an answer cannot end the tests early, change
what `==` or `assert` mean for them, read them, or write their verdict. What it can do: see the arguments it is called
with, and answer those by heart. Tests that compare objects of the answer's own classes fail: two processes share no
objects.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlkd.core.types import Answer, Prompt
from rlkd.rewards.extract import without_thoughts
from rlkd.rewards.options import wrong

Open = Callable[[str, float, float, bool], AbstractContextManager[Any]]  # source, memory in GiB, seconds, packages

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_START_S = 1.0  # for a sandbox, on a busy machine
_INPUT, _OUTPUT = ("input", "stdin"), ("output", "stdout", "expected_output")


@dataclass(frozen=True)
class Case:
    """One test: a piece of Python, or an input and the output that is expected of it."""

    test: str | None = None
    stdin: str = ""
    stdout: str = ""


@dataclass(frozen=True)
class Result:
    """How an answer did in one test: passed, failed, raised, answer (it does not load), exit (its code is not 0),
    output (too much), timeout, ended, late (its time was over before)."""

    how: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.how == "passed"


@dataclass(frozen=True)
class Code:
    """1 if the answer's last fenced Python block, or all of it if it has none, passes every test of the row, else 0.

    `partial`: the share of the tests that it passes. Each test has `test_s` seconds, all of an answer's together
    `answer_s`: what is not reached by then is not passed. The whole group must fit into `verifier.timeout_s`.
    ValueError for a row without usable tests.
    """

    runs_code: ClassVar[bool] = True  # the jail gives it a sandbox, or refuses

    weight: float = 1.0
    tests: str = "tests"  # the row's field with the tests
    test_setup: str = "test_setup"  # the row's field with what runs before each test, if it has it
    partial: bool = False
    compare: Literal["lines", "words"] = "lines"  # of outputs: lines without the white space at their ends, or words
    test_s: float = 2.0
    answer_s: float = 4.0
    memory_gib: float = 1.0  # of each process of the answer
    packages: bool = False  # True: the answer may import what is installed here, not only Python's own library

    def __post_init__(self) -> None:
        for option in ("test_s", "answer_s", "memory_gib"):
            if not 0 < getattr(self, option) < 1e6:
                raise wrong(self, option, "must be above 0", "leave it out for the default")
        if self.memory_gib < 0.125:
            raise wrong(self, "memory_gib", "Python itself needs 0.125", "memory_gib: 1.0")

    def equip(self, open_: Open) -> None:
        """The jail's sandbox: what opens a session with a source in it."""
        object.__setattr__(self, "_open", open_)

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        cases = self.cases(prompt)
        return [self._score(self.results(prompt, cases, a.text)) for a in answers]

    def longest_s(self, samples: int) -> float:
        """The most seconds that a group of so many answers takes."""
        return samples * (self.answer_s + _START_S)

    def cases(self, prompt: Prompt) -> list[Case]:
        """The row's tests. ValueError says what is wrong with them."""
        given = prompt.metadata.get(self.tests)
        if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
            try:
                given = json.loads(given)
            except ValueError:
                given = [given]  # Python that begins with a bracket
        try:
            cases = _cases(given, prompt.metadata.get("entry_point"))
        except (TypeError, KeyError, IndexError) as e:
            raise ValueError(f"the tests of prompt {prompt.id!r}: {e}") from e
        if not cases:
            raise ValueError(
                f"prompt {prompt.id!r} has no tests in its field {self.tests!r}; the reward `code` needs a list of "
                "asserts, or of {input, output}"
            )
        return cases

    def results(self, prompt: Prompt, cases: Sequence[Case], text: str) -> list[Result]:
        """One result per test; without `partial`, none behind the first that is not passed."""
        opened: Open | None = getattr(self, "_open", None)
        if opened is None:
            raise RuntimeError("the reward `code` runs in the verifier's jail only: there it is given a sandbox")
        before = prompt.metadata.get(self.test_setup) or ""
        if not isinstance(before, str):
            before = "\n".join(str(line) for line in before) if isinstance(before, list | tuple) else str(before)
        until = time.monotonic() + self.answer_s
        results: list[Result] = []
        with opened(program(text), self.memory_gib, self.answer_s, self.packages) as session:
            for case in cases:
                left = until - time.monotonic()
                limit_s = min(self.test_s, left)
                results.append(self._run(session, case, before, limit_s) if left > 0 else Result("late"))
                if not (results[-1].passed or self.partial):
                    break
        return results + [Result("late")] * (len(cases) - len(results))

    def _run(self, session: Any, case: Case, before: str, limit_s: float) -> Result:
        if case.test is not None:
            tested = session.test(before, case.test, limit_s)
            return Result(tested.how, tested.detail)
        ran = session.program(case.stdin, limit_s)
        if ran.overflow:
            return Result("output", "it printed more than 1 MiB")
        if ran.code is None:
            return Result("timeout", f"no end within {limit_s:.2g} s")
        if ran.code != 0:
            return Result("exit", f"exit code {ran.code}\n{ran.stderr}")
        same = _normal(ran.stdout, self.compare) == _normal(case.stdout, self.compare)
        return Result("passed") if same else Result("failed", f"it printed {ran.stdout[:200]!r}")

    def _score(self, results: Sequence[Result]) -> float:
        passed = sum(r.passed for r in results)
        return passed / len(results) if self.partial else float(passed == len(results))


def program(text: str) -> str:
    """The code in an answer: the last fenced block that says python, else the last that says nothing, else all of the
    text. A block that is never closed counts as closed at the end: an answer may be cut off, and fails its tests."""
    text = without_thoughts(text)
    blocks: list[tuple[str, str]] = []
    start: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if start is None:
            start = fence
        elif not fence[1]:
            blocks.append((start[1].lower(), text[start.end() + 1 : fence.start()]))
            start = None
    if start is not None:
        blocks.append((start[1].lower(), text[start.end() + 1 :]))
    for languages in (_PYTHON, ("",)):
        if found := [code for language, code in blocks if language in languages]:
            return found[-1]
    return text


def _cases(given: object, entry_point: object) -> list[Case]:
    if isinstance(given, str):
        called = f"{given}\ncheck({entry_point})" if "def check(" in given and entry_point else given
        return [Case(called)] if given.strip() else []
    if isinstance(given, Mapping):
        inputs, outputs, name = given["inputs"], given["outputs"], given.get("fn_name")
        if len(inputs) != len(outputs):
            raise TypeError(f"{len(inputs)} inputs and {len(outputs)} outputs")
        pairs = zip(inputs, outputs, strict=True)
        if name is None:
            return [Case(stdin=_lines(i), stdout=_lines(o)) for i, o in pairs]
        return [Case(_CALL.format(name=str(name), arguments=list(i), expected=o)) for i, o in pairs]
    if not isinstance(given, list | tuple):
        return []
    return [_case(one) for one in given]


def _case(one: object) -> Case:
    if isinstance(one, str):
        return Case(one)
    if not isinstance(one, Mapping):
        raise TypeError(f"a test must be a text or {{input, output}}, not {type(one).__name__}")
    stdin = next((one[name] for name in _INPUT if name in one), None)
    stdout = next((one[name] for name in _OUTPUT if name in one), None)
    if stdin is None or stdout is None:
        raise TypeError(f"a test with the fields {', '.join(map(str, one))}; expected input and output")
    return Case(stdin=_lines(stdin), stdout=_lines(stdout))


def _lines(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# A call as APPS writes it: methods of `Solution` too, one expected value perhaps in a list, tuples as lists.
_CALL = """\
_called = Solution().{name} if "Solution" in globals() else {name}
_result = _called(*{arguments!r})
_result = list(_result) if isinstance(_result, tuple) else _result
_expected = {expected!r}
assert _result == _expected or (isinstance(_expected, list) and [_result] == _expected), repr(_result)
"""


def _normal(text: str, compare: str) -> list[str]:
    return text.split() if compare == "words" else [line.rstrip() for line in text.rstrip().splitlines()]
