"""Whatever an answer is: a score or a named outcome, never an exception out of the jail.

The suite judges some hundred answers. More, at low priority (this many answers in all, spread over the rewards):

    RLKD_FUZZ=30000 nice -n 19 python -m pytest tests/test_verifier_fuzz.py -s
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rlkd.core.types import Answer, Finish
from rlkd.core.verdict import Outcome
from rlkd.engines.jail import Jail
from rlkd.rewards.table import find, pack
from tests.rewards_help import prompt

GROUP = 16  # answers judged together
ASKED = int(os.environ.get("RLKD_FUZZ", "0"))
PATHOLOGICAL = str(Path(__file__).parent / "pathological.py")

REWARDS: dict[str, dict[str, Any]] = {
    "math": {},
    "math boxed": {"where": "boxed"},
    "exact": {"where": "boxed"},
    "exact tag": {"where": "tag"},
    "exact regex": {"where": "regex", "pattern": r"answer is (\w+)"},
    "regex": {"pattern": r"#\s*{answer}$"},
    "choice": {},
    "format": {"tags": ("think", "answer")},
    "repetition": {},
    f"{PATHOLOGICAL}:extracts_code": {},
}
GOLDS = ["42", "B", r"\frac{1}{2}", "x^2+1", r"\{1,2\}", "(1, 2]", "1e5", "-0.5", r"\sqrt{2}", "3:2", ""]
FRAGMENTS = [
    r"\boxed{", "}", "{", "$", "$$", r"\(", r"\)", r"\[", r"\]", r"\frac{", r"\sqrt[", r"\left(", r"\right)", "^",
    "_", "^{9^{9", "**", "!", "!!!", "9" * 40, "0.", "1e", "-", "+", "/", ",", ";", "=", "<", ">", "≤", "π", "∞", "½",
    "٣", "²", r"\sum_{n=1}^{", r"\int_0^", r"\lim_{x\to", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", r"\text{",
    r"\mathrm{", r"\infty", r"\pi", r"\cdot", r"\times", r"\log", r"\sin", r"\binom{", r"\cup", r"\{", r"\}", "%",
    r"\%", "°", "x", "i", "e", "the answer is ", "answer: ", "(B)", "B.", "<answer>", "</answer>", "<think>",
    "</think>", "# 42", "```", "```python", "\n", " ", "\t", "\x00", "\ud800", "\udfff", "\u202e", "\u2028", "💥", "a",
    "I", "None", "nan", "inf", "1,000", "42", "0" * 30,
]  # fmt: skip

piece = st.sampled_from(FRAGMENTS) | st.text(st.characters(), max_size=8)
short = st.lists(piece, max_size=14).map("".join)
huge = st.builds(lambda a, n, b: a * n + b, piece, st.sampled_from([50, 900, 5000, 50_000]), short)
nested = st.builds(
    lambda a, x, b, n: a * n + x + b * n,
    st.sampled_from(["(", "{", "[", r"\boxed{", r"\frac{1}{", r"\sqrt{", r"\left(", "-", "<answer>", "```\n"]),
    short,
    st.sampled_from([")", "}", "]", r"\right)", "</answer>", "\n```\n", ""]),
    st.integers(1, 600),
)
answer = st.one_of(short, short, short, nested, huge)
groups = st.lists(answer, min_size=GROUP, max_size=GROUP)

COUNTED = Counter[str]()
WEIGHT = 1 if not ASKED else max(ASKED // (GROUP * len(REWARDS)) + 1, 1)


@pytest.fixture(scope="module")
def jails() -> Iterator[dict[str, Jail]]:
    made: dict[str, Jail] = {}
    for key, options in REWARDS.items():
        name = key if ":" in key else key.split()[0]
        made[key] = Jail(pack({"it": find(name)(**options)}), timeout_s=10.0, memory_gib=1.0)
    yield made
    for jail in made.values():
        jail.close()
    print(f"\nanswers judged: {COUNTED['answers']}; {dict(COUNTED)}")


@pytest.mark.faults("F32", "F34", "F35")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("key", REWARDS)
def test_a_score_or_a_named_outcome(jails: dict[str, Jail], key: str) -> None:
    """The built-in rewards raise on no answer at all; running out of time or memory is allowed, and has its name."""

    @settings(
        max_examples=WEIGHT if ASKED else 4,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(texts=groups, gold=st.sampled_from(GOLDS), finish=st.sampled_from(list(Finish)))
    def judged(texts: list[str], gold: str, finish: Finish) -> None:
        right = "B" if key == "choice" else gold
        verdicts = jails[key].score(prompt(right), [Answer(t, finish, len(t) % 4096) for t in texts])
        assert len(verdicts) == GROUP
        for text, verdict in zip(texts, verdicts, strict=True):
            COUNTED["answers"] += 1
            COUNTED[f"{key.rpartition(':')[2]}: {verdict.outcome}"] += 1
            assert verdict.outcome in (Outcome.SCORED, Outcome.TIMEOUT, Outcome.MEMORY), (right, text[:500], verdict)
            for score in verdict.scores.values():
                assert score is None or (math.isfinite(score) and -1.0 <= score <= 1.0)

    judged()
