"""From scores to a reward (rewards/mix.py), and what becomes of an answer a reward failed on (workers/tally.py)."""

import logging
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlkd.core.errors import DataError
from rlkd.core.types import Answer, Finish, Origin, Sample
from rlkd.core.verdict import Failure, Outcome, Verdict
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import find
from rlkd.workers.tally import ENOUGH, Tally
from tests.rewards_help import prompt


@pytest.mark.parametrize(
    ("accuracy", "form", "repeated", "reward"),
    [(1, 1, 0, 1.0), (1, 0, 0, 0.9), (0, 1, 0, 0.1), (1, 1, 1, 0.0), (1, 0, 1, -0.1), (0, 1, 1, -0.9), (0, 0, 1, 0.0)],
)
def test_ampo_golden_a1(accuracy: int, form: int, repeated: int, reward: float) -> None:
    rewards = {
        "math": find("math")(weight=0.9),
        "format": find("format")(weight=0.1),
        "repetition": find("repetition")(),
    }
    parts = {"math": float(accuracy), "format": float(form), "repetition": -float(repeated)}
    scores, mixed = Mix.of(rewards)(parts)
    assert mixed == pytest.approx(reward)
    assert scores == parts


def test_a_part_that_cannot_judge_makes_the_sample_unjudged() -> None:
    scores, mixed = Mix({"a": 0.9, "b": 0.0})({"a": 1.0, "b": None})
    assert math.isnan(mixed)
    assert scores["a"] == 1.0
    assert math.isnan(scores["b"])
    with pytest.raises(KeyError):
        Mix({"a": 1.0})({})


def test_a_penalty_alone_is_the_reward() -> None:
    assert Mix({"repetition": 1.0}, frozenset({"repetition"}))({"repetition": -1.0})[1] == -1.0


def sample() -> Sample:
    tokens = np.arange(4, dtype=np.int32)
    origin = np.array([Origin.PROMPT, Origin.PROMPT, Origin.POLICY, Origin.POLICY], np.uint8)
    return Sample(tokens, origin, np.zeros(4, np.float32), (0, 0))


ANSWER = Answer("my answer " * 40, Finish.STOP, 2)
FAILED = Verdict(failure=Failure(Outcome.RAISED, "mine", "Traceback…\n  line\nValueError: no", "printed"))
JUDGED = Verdict({"mine": 1.0})
UNJUDGED = Verdict({"mine": None})


def settle(tally: Tally, *verdicts: Verdict) -> Sequence[Sample]:
    n = len(verdicts)
    return tally.settle(prompt(), [sample()] * n, [ANSWER] * n, verdicts)


@pytest.mark.faults("F38")
def test_on_error_fail_names_everything() -> None:
    with pytest.raises(DataError) as caught:
        settle(Tally(Mix({"mine": 1.0}), "fail", 0.05), JUDGED, FAILED)
    said = str(caught.value)
    for part in (
        "RLKD-D301",
        "`mine`",
        "raised",
        "'p7'",
        "ValueError: no",
        "printed",
        "my answer",
        "verifier.on_error",
    ):
        assert part in said
    assert "my answer " * 21 not in said  # the first 200 characters
    assert pickle.loads(pickle.dumps(caught.value)).exit_code == 4


def test_on_error_drop_leaves_it_unjudged_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally(Mix({"mine": 0.5}), "drop", 0.05)
    with caplog.at_level(logging.WARNING, "rlkd.rewards"):
        settled = settle(tally, JUDGED, *[FAILED] * 5, replace(JUDGED, retried=True))
    assert [s.reward for s in settled] == pytest.approx([0.5, *[math.nan] * 5, 0.5], nan_ok=True)
    assert settled[0].scores == {"mine": 1.0}
    assert settled[1].scores == {}
    assert len(caplog.records) == 3  # the first three in full, the rest in the counts
    counts = tally.counts()
    assert (counts["scored"], counts["raised"], counts["recovered"], counts["timeout"]) == (2, 5, 1, 0)


@pytest.mark.faults("F38")
def test_zero_only_by_choice_and_counted() -> None:
    tally = Tally(Mix({"mine": 1.0}), "zero", 0.05)
    settled = settle(tally, JUDGED, FAILED, UNJUDGED)
    assert [s.reward for s in settled] == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)  # None is no error
    assert tally.counts()["zeroed"] == 1
    assert tally.counts()["unjudged"] == 1


@pytest.mark.faults("F38")
@pytest.mark.parametrize("bad", [FAILED, UNJUDGED])
def test_too_many_unjudged_samples_stop_the_run(bad: Verdict) -> None:
    tally = Tally(Mix({"mine": 1.0}), "drop", 0.05)
    settle(tally, *[JUDGED] * (ENOUGH - 11), *[bad] * 10)  # 199: too few to say
    settle(tally, JUDGED)  # 10 of 200 is 5 %: allowed
    with pytest.raises(DataError, match="RLKD-D302") as caught:
        settle(tally, bad)
    assert "11 of the last 201" in str(caught.value)
    assert "'p7'" in str(caught.value)
