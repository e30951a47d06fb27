"""What must not reach a computer-algebra system: expressions that are small to write and endless to evaluate.

The jail ends those that get through; this keeps the usual ones from costing a timeout each (Math-Verify issue 65).
"""

import re

LONGEST = 2000  # characters
DEEPEST = 40  # brackets within brackets
LARGEST_POWER = 10_000
LARGEST_FACTORIAL = 1_000
DIGITS = 1_000  # in one number; Python itself refuses over 4300

_POWER = re.compile(r"(?:\^|\*\*)[\s{(+-]*(\d+)")
_TOWER = re.compile(r"(?:\^|\*\*)[\s{(+-]*\w+(?:[.]\d+)?[\s})]*(?:\^|\*\*)")
_FACTORIAL = re.compile(r"(\d+)[\s})]*!")
_LONG_NUMBER = re.compile(rf"\d{{{DIGITS + 1}}}")


def too_heavy(expression: str) -> str | None:
    """Why the expression must not be evaluated, or None if it may."""
    if len(expression) > LONGEST:
        return f"longer than {LONGEST} characters"
    if _LONG_NUMBER.search(expression):
        return f"a number of more than {DIGITS} digits"
    if _depth(expression) > DEEPEST:
        return f"brackets more than {DEEPEST} deep"
    if any(int(n) > LARGEST_POWER for n in _POWER.findall(expression)):
        return f"a power above {LARGEST_POWER}"
    if _TOWER.search(expression):
        return "a power of a power"
    if any(int(n) > LARGEST_FACTORIAL for n in _FACTORIAL.findall(expression)) or "!!!" in expression:
        return f"a factorial above {LARGEST_FACTORIAL}"
    return None


def _depth(expression: str) -> int:
    deepest = depth = 0
    for c in expression:
        depth += (c in "{([") - (c in "})]")
        deepest = max(deepest, depth)
    return deepest
