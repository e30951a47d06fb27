"""The reward `math`: where the answer is found, what is equal, what is never evaluated. And places in a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkd.rewards.extract import boxed, last_line, matched, tagged, without_thoughts
from rlkd.rewards.guard import too_heavy
from tests.rewards_help import score


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{4} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed {7}", "7"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"}} \boxed{}", ""),
        ("none", None),
    ],
)
def test_boxed(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


def test_other_places() -> None:
    assert tagged("<a>1</a> <a>2</a> 3", "a") == "2"
    assert tagged("<a>1", "a") is None
    assert tagged("1</a>", "a") is None
    assert last_line("one\n two \n\n") == " two "
    assert last_line("") == ""
    assert matched("x=1 x=22", r"x=(\d+)") == "22"
    assert matched("x=1 x=22", r"x=\d+") == "x=22"
    assert matched("", "x") is None
    assert without_thoughts("<think>a</think> b </think>c") == "c"
    assert without_thoughts("no thoughts") == "no thoughts"


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("42", r"so \boxed{42}", 1.0),
        ("42", "the answer is 42.", 1.0),
        ("42", "42", 1.0),
        ("42", r"\boxed{043}", 0.0),
        ("42", r"\boxed{042}", 1.0),
        ("1,000", r"\boxed{1000}", 1.0),
        ("-0", "0", 1.0),
        ("12", r"\boxed{13}, no: \boxed{12}", 1.0),
        ("13", r"\boxed{13}, no: \boxed{12}", 0.0),
        ("1/2", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", "<answer>1/2</answer>", 1.0),
        ("$x+1$", "<answer>1+x</answer>", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("2", "<answer>2x+1</answer>", 0.0),
        (r"\boxed{7}", "<answer>The total is 7 apples</answer>", 1.0),
        ("7", "<think>it is 7</think> I give up", 0.0),
        ("8", "<answer>7</answer> <answer>8</answer>", 1.0),
        (r"50\%", r"\boxed{0.5}", 1.0),
        (r"\sqrt{2}/2", r"\boxed{\frac{1}{\sqrt2}}", 1.0),
        ("3", "x=3", 1.0),
        ("Paris", r"\boxed{Paris}", 1.0),
        ("42", "", 0.0),
        ("", "42", None),
        ("", "", None),
    ],
)
def test_math(gold: str, text: str, right: float | None) -> None:
    assert score("math", text, gold) == right


def test_math_insists_on_a_place() -> None:
    assert score("math", "42", where="boxed") == 0.0
    assert score("math", r"\boxed{42}", where="boxed") == 1.0
    assert score("math", r"\boxed{42}", where="tag") == 0.0
    assert score("math", "<answer>42</answer>", where="tag") == 1.0


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40))
def test_math_of_integers_is_equality(gold: int, other: int) -> None:
    assert score("math", rf"\boxed{{{other}}}", str(gold)) == float(gold == other)
    assert score("math", rf"\boxed{{{gold:,}}}", str(gold)) == 1.0


def test_the_fast_path_never_reaches_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("math-verify was asked")

    monkeypatch.setattr("rlkd.rewards.math._parsed", never)
    assert score("math", r"\boxed{42}") == 1.0
    assert score("math", r"\boxed{41}") == 0.0
    assert score("math", r"\boxed{x + 1}", "x+1") == 1.0
    with pytest.raises(AssertionError, match="math-verify was asked"):
        score("math", r"\boxed{1+x}", "x+1")


@pytest.mark.faults("F35")
@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "9^{9^{9}}",
        "2^{100000}",
        "10001!",
        "((3!)!)!!!",
        "1" * 1001 + "x",
        "(" * 41 + ")" * 41,
        "x" * 2001,
        "x^{y^{z}}",
    ],
)
def test_what_must_not_be_evaluated(expression: str) -> None:
    assert too_heavy(expression)
    assert score("math", rf"\boxed{{{expression}}}", "1") == 0.0
    assert score("math", rf"\boxed{{{expression}}}", expression) == 1.0  # equal as text
    assert score("math", "1", expression) is None  # nobody can say


@pytest.mark.faults("F35")
@pytest.mark.parametrize(
    "expression", ["2^{10}", "x^2 + y^2", "10!", r"\frac{1}{\sqrt{2}}", "2^3 \\cdot 3^2", "10^{-9}"]
)
def test_what_may_be_evaluated(expression: str) -> None:
    assert too_heavy(expression) is None
