"""More of the jail: files, processes and channels it keeps in bounds; rewards that contradict themselves; regular
expressions that never end; the line that judges a failed answer again."""

import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rlkd.core.errors import ConfigError, DataError
from rlkd.core.types import Answer, Finish, Origin, Prompt, Sample
from rlkd.core.verdict import Failure, Outcome, Verdict
from rlkd.engines import cell, jailed, replay
from rlkd.engines.jail import Jail
from rlkd.rewards.backtracking import endless
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import find, pack
from rlkd.workers.repro import Repro
from rlkd.workers.tally import SHOWN, Tally

pytestmark = pytest.mark.stack  # real processes that hang, burst and are killed
PATHOLOGICAL = str(Path(__file__).parent / "pathological.py")
PROMPT = Prompt("p7", np.zeros(3, np.int32), "42", metadata={"level": 3})
Make = Callable[..., Jail]


@pytest.fixture
def jail() -> Iterator[Make]:
    made: list[Jail] = []

    def make(name: str, options: dict[str, Any] | None = None, **limits: Any) -> Jail:
        limits = {"timeout_s": 5.0, "grace_s": 0.5, **limits}
        made.append(Jail(pack({name: find(f"{PATHOLOGICAL}:{name}")(**(options or {}))}), **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def answers(*texts: str) -> list[Answer]:
    return [Answer(t, Finish.STOP, len(t)) for t in texts]


def outcomes(verdicts: list[Verdict]) -> list[Outcome]:
    return [v.outcome for v in verdicts]


@pytest.mark.faults("F37")
def test_a_file_has_a_largest_size(jail: Make, tmp_path: Path) -> None:
    options = {"path": str(tmp_path / "file"), "size": jailed.FILE_BYTES}
    verdicts = jail("writes_a_huge_file", options).score(PROMPT, answers("fine", "poison"))
    assert outcomes(verdicts) == [Outcome.SCORED, Outcome.RAISED]
    assert verdicts[1].failure is not None
    assert "File too large" in verdicts[1].failure.detail
    smaller = jail("writes_a_huge_file", {**options, "size": jailed.FILE_BYTES - 1})
    assert outcomes(smaller.score(PROMPT, answers("poison"))) == [Outcome.SCORED]  # the control


@pytest.mark.faults("F37")
@pytest.mark.parametrize("piece", ["ff", "00", "00000001"])
def test_what_is_no_reply_is_a_crash_and_never_an_exception(jail: Make, piece: str) -> None:
    """A length of 4 GiB, of nothing, of a byte that is no JSON: the worker reads at most LARGEST_REPLY."""
    verdicts = jail("floods_the_channel", {"piece": piece}).score(PROMPT, answers("fine", "poison"))
    assert outcomes(verdicts) == [Outcome.SCORED, Outcome.CRASHED]
    assert cell.LARGEST_REPLY == 1 << 20


@pytest.mark.faults("F36")
def test_a_child_that_ends_before_it_has_read_its_request_is_a_crash(jail: Make) -> None:
    """The kernel says "connection reset" then, not end of file."""
    made = jail("good", timeout_s=20.0)
    made.start()
    child = made._cells[0]._child
    assert child is not None
    stopped = psutil.Process(child.pid)
    stopped.suspend()
    while stopped.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    threading.Timer(0.3, stopped.kill).start()
    first = made._cells[0].call(PROMPT, answers("x" * 1000), 20.0)
    assert isinstance(first, Failure)
    assert first.outcome is Outcome.CRASHED
    assert "SIGKILL" in first.detail


@pytest.mark.faults("F37")
def test_a_burst_of_processes_ends_with_its_group(jail: Make, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    made = jail("forks_many", {"note": str(note)}, timeout_s=1.0)
    verdicts = made.score(PROMPT, answers("poison"))
    assert outcomes(verdicts) == [Outcome.TIMEOUT]
    pids = [int(line) for line in note.read_text().split()]
    assert len(pids) >= 60
    until = time.monotonic() + 10
    while (left := [p for p in pids if _lives(p)]) and time.monotonic() < until:
        time.sleep(0.02)
    assert left == []


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- a reward that contradicts itself


@pytest.mark.faults("F40")
def test_a_share_of_the_groups_is_judged_again_in_another_process(jail: Make, tmp_path: Path) -> None:
    made = jail("changes_its_mind", {"note": str(tmp_path / "note")}, recheck_fraction=1.0)
    verdicts = made.score(PROMPT, answers("sure", "fickle", "sure"))
    assert [v.agrees for v in verdicts] == [True, False, True]
    assert [v.scores["changes_its_mind"] for v in verdicts] == [1.0, 1.0, 1.0], "the first judging counts"
    never = jail("changes_its_mind", {"note": str(tmp_path / "other")})
    assert [v.agrees for v in never.score(PROMPT, answers("sure", "fickle"))] == [None, None]
    assert (tmp_path / "other").read_text() == "x", "judged once"


@pytest.mark.faults("F40")
def test_which_groups_are_judged_again_is_the_same_in_every_run(jail: Make) -> None:
    prompts = [Prompt(f"p{i}", np.zeros(1, np.int32), "42", seed=i) for i in range(400)]
    chosen = [[p.id for p in prompts if jail("good", recheck_fraction=0.25)._chosen(p)] for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert 70 <= len(chosen[0]) <= 130


def sample() -> Sample:
    origin = np.full(4, Origin.POLICY, np.uint8)
    return Sample(np.arange(4, dtype=np.int32), origin, np.zeros(4, np.float32), (0, 0))


@pytest.mark.faults("F40")
def test_disagreement_is_counted_said_and_a_metric(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally(Mix({"mine": 1.0}), "fail", 0.05)
    assert math.isnan(tally.disagreement()), "unknown, not 0"
    verdicts = [Verdict({"mine": 1.0}, agrees=a) for a in (True, True, False, None)]
    tally.settle(PROMPT, [sample()] * 4, answers("a", "b", "c", "d"), verdicts)
    assert tally.disagreement() == pytest.approx(1 / 3)
    assert (tally.counts()["rechecked"], tally.counts()["disagreed"]) == (3, 1)
    assert "'c'" in caplog.text
    assert "verifier.recheck_fraction" in caplog.text


# --- regular expressions


@pytest.mark.faults("F34")
@pytest.mark.parametrize("pattern", [r"(a+)+$", r"answer: (\d+)+x", r"(a|aa)+$", r".*.*.*=x"])
def test_a_pattern_that_never_ends_is_refused_at_load(pattern: str) -> None:
    for reward, options in (("regex", {}), ("format", {"tags": ()}), ("exact", {"where": "regex"})):
        with pytest.raises(ConfigError, match="RLKD-C304") as caught:
            find(reward)(pattern=pattern, **options)
        assert "too many ways" in str(caught.value)


@pytest.mark.faults("F34")
@pytest.mark.parametrize(
    "pattern",
    [r"#\s*{answer}$", r"answer is (\w+)", r"(?:a|b)+c", r"<answer>(.*?)</answer>", r"\s*(\d+)\s*=\s*(\d+)\s*$",
     r"(?P<x>[^<]*<b>)*c", r"^\s+|\s+$", r"(?:\w+ )+end", r"(\d{1,3})+(?!x)", r"a*+b", r"(?>a+)+b", r"(a)?(?(1)b|c)",
     "\ud800+", r"\Z", ""],
)  # fmt: skip
def test_patterns_that_end_are_allowed(pattern: str) -> None:
    assert endless(pattern) is None


@pytest.mark.faults("F34")
@pytest.mark.parametrize(
    "text",
    [
        "answer" + " " * 200_000,
        "answer is " * 50_000,
        r"\text{" * 50_000,
        r"\text" + " " * 200_000,
        "answer" + "\t\n" * 50_000 + ":" + " " * 100_000 + "((",
    ],
    ids=["spaces", "answers", "texts", "text", "mixed"],
)
def test_a_choice_is_read_in_linear_time(text: str) -> None:
    """Found by tests/test_verifier_fuzz.py: each of these took longer than the verifier's ten seconds."""
    assert find("choice")().chosen(text) is None


# --- an answer that a reward failed on


def tally_of(jail_rewards: bytes, on_error: Any) -> Tally:
    repro = Repro(jail_rewards, {"timeout_s": 20.0, "memory_gib": 1.0})
    return Tally(Mix({"raises": 1.0}), on_error, 1.0, repro)


FAILED = Verdict(failure=Failure(Outcome.RAISED, "raises", "Traceback\nValueError: I cannot read poison"))


@pytest.mark.faults("F38")
def test_the_error_names_one_line_that_judges_the_answer_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rewards = pack({"raises": find(f"{PATHOLOGICAL}:raises")()})
    with pytest.raises(DataError) as caught:
        tally_of(rewards, "fail").settle(PROMPT, [sample()], answers("poison"), [FAILED])
    (line,) = [x for x in str(caught.value).splitlines() if "to see it alone: " in x]
    command = shlex.split(line.partition("alone: ")[2])
    assert command[:3] == ["python", "-m", "rlkd.engines.replay"]
    assert os.stat(command[3]).st_mode & 0o777 == 0o600
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 4
    assert "ValueError: I cannot read poison" in done.stdout
    assert "'p7'" in done.stdout


@pytest.mark.faults("F38")
def test_the_first_failures_are_shown_with_their_line_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tally = tally_of(pack({"raises": find(f"{PATHOLOGICAL}:raises")()}), "drop")
    settled = tally.settle(PROMPT, [sample()] * 9, answers(*["poison"] * 9), [FAILED] * 9)
    assert all(math.isnan(s.reward) for s in settled), "never a silent 0"
    assert caplog.text.count("rlkd.engines.replay") == SHOWN
    assert len(list(tmp_path.iterdir())) == SHOWN
    assert tally.counts()["raised"] == 9


@pytest.mark.faults("F38")
def test_a_row_that_is_no_json_has_no_line_but_still_its_error() -> None:
    odd = Prompt("p7", np.zeros(1, np.int32), "42", metadata={"set": {1}})
    with pytest.raises(DataError, match="no command: Object of type set"):
        tally_of(pack({"raises": find(f"{PATHOLOGICAL}:raises")()}), "fail").settle(
            odd, [sample()], answers("poison"), [FAILED]
        )


def test_replay_of_an_answer_that_is_fine_and_of_a_file_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    repro = Repro(pack({"exact": find("exact")()}), {"timeout_s": 20.0})
    path = repro(PROMPT, answers("42")[0]).split()[-1]
    assert replay.main([path]) == 0
    assert "{'exact': 1.0}" in capsys.readouterr().out
    Path(path).write_text(json.dumps({"rewards": []}))
    for arguments in ([path], [str(tmp_path / "none")], []):
        assert replay.main(arguments) == 2
        assert "use: python -m" in capsys.readouterr().err
