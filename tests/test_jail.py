"""The verifiers' jail against everything a reward can do (reliability_ux.md F32–F39), with negative controls."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rlkd.core.errors import DataError
from rlkd.core.types import Answer, Finish, Prompt
from rlkd.core.verdict import Failure, Outcome, Verdict
from rlkd.engines.jail import Jail
from rlkd.engines.keeper import JailClosed
from rlkd.engines.probe import probe
from rlkd.rewards.table import find, pack

pytestmark = pytest.mark.stack  # real processes that hang, burst and are killed
HERE = Path(__file__).parent
PATHOLOGICAL = str(HERE / "pathological.py")
PROMPT = Prompt("p7", np.zeros(3, np.int32), "42")
TIMEOUT_S, GRACE_S = 0.5, 0.3
Make = Callable[..., Jail]


def packed(name: str, **options: Any) -> bytes:
    return pack({name: find(f"{PATHOLOGICAL}:{name}")(**options)})


def answers(*texts: str) -> list[Answer]:
    return [Answer(t, Finish.STOP, len(t)) for t in texts]


@pytest.fixture
def jail() -> Iterator[Make]:
    """Makes jails of one pathological reward; ends them afterwards."""
    made: list[Jail] = []

    def make(name: str, options: dict[str, Any] | None = None, **limits: Any) -> Jail:
        limits = {"timeout_s": TIMEOUT_S, "grace_s": GRACE_S, **limits}
        made.append(Jail(packed(name, **(options or {})), **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


def outcomes(verdicts: Sequence[Verdict]) -> list[Outcome]:
    return [v.outcome for v in verdicts]


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends within the time; a zombie that waits for a parent of ours counts as ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_scores_in_order(jail: Make) -> None:
    verdicts = jail("good").score(PROMPT, answers("42", "41", "42"))
    assert [v.scores for v in verdicts] == [{"good": 1.0}, {"good": 0.0}, {"good": 1.0}]
    assert not any(v.retried for v in verdicts)
    assert jail("good").score(PROMPT, []) == []


@pytest.mark.faults("F32", "F33", "F34", "F36", "F37", "F38")
@pytest.mark.parametrize(
    ("reward", "outcome", "says"),
    [
        ("raises", Outcome.RAISED, "ValueError: I cannot read poison"),
        ("exits", Outcome.RAISED, "SystemExit: enough"),
        ("hangs", Outcome.TIMEOUT, "in hangs"),
        ("swallows_exceptions", Outcome.TIMEOUT, "in swallows_exceptions"),
        ("swallows", Outcome.TIMEOUT, "killed"),
        ("holds_the_interpreter", Outcome.TIMEOUT, "killed"),
        ("backtracks", Outcome.TIMEOUT, "in backtracks"),
        ("prints", Outcome.TIMEOUT, "in prints"),
        ("leaves", Outcome.CRASHED, "exit code 3"),
        ("segfaults", Outcome.CRASHED, "SIGSEGV"),
    ],
)
def test_a_poisonous_answer_is_named_and_costs_its_siblings_nothing(
    jail: Make, reward: str, outcome: Outcome, says: str
) -> None:
    verdicts = jail(reward, timeout_s=1.5).score(PROMPT, answers("fine", "poison", "fine too"))  # of which it needs 0.8
    assert outcomes(verdicts) == [Outcome.SCORED, outcome, Outcome.SCORED]
    assert verdicts[0].scores == verdicts[2].scores == {reward: 1.0}
    failure = verdicts[1].failure
    assert failure is not None
    assert failure.reward == reward
    assert says in failure.detail
    assert verdicts[1].scores == {}, "a failure has no score, least of all 0"


@pytest.mark.faults("F36", "F37")
def test_only_the_end_of_what_is_printed_is_kept(jail: Make) -> None:
    failure = jail("prints").score(PROMPT, answers("poison"))[0].failure
    assert failure is not None
    assert 1000 < len(failure.output) <= 65_536
    crashed = jail("segfaults").score(PROMPT, answers("poison"))[0].failure
    assert crashed is not None
    assert "Segmentation fault" in crashed.output  # faulthandler's last words


@pytest.mark.faults("F37")
def test_memory_is_limited_and_the_limit_is_what_stops_it(jail: Make) -> None:
    verdicts = jail("eats_memory", memory_gib=0.25).score(PROMPT, answers("fine", "poison"))
    assert outcomes(verdicts) == [Outcome.SCORED, Outcome.MEMORY]
    enough = jail("eats_memory", memory_gib=2.0, timeout_s=10.0).score(PROMPT, answers("poison"))
    assert outcomes(enough) == [Outcome.SCORED]  # the negative control: the same reward with the memory it needs


@pytest.mark.faults("F39")
@pytest.mark.parametrize("value", ["nan", "inf", "text", "huge", "list", "complex", "integer"])
def test_a_value_that_is_no_score_is_an_outcome_of_its_own(jail: Make, value: str) -> None:
    verdicts = jail("strange").score(PROMPT, answers("fine", value))
    assert outcomes(verdicts) == [Outcome.SCORED, Outcome.BAD_VALUE]
    failure = verdicts[1].failure
    assert failure is not None
    assert "score() gave" in failure.detail


@pytest.mark.faults("F39")
def test_none_is_no_failure_and_a_truth_value_is_a_number(jail: Make) -> None:
    verdicts = jail("strange").score(PROMPT, answers("none", "true"))
    assert [v.scores["strange"] for v in verdicts] == [None, 1.0]


@pytest.mark.faults("F39")
@pytest.mark.parametrize(
    ("reward", "says"), [("Short", "gave 1 values for 2 answers"), ("Text", "gave '11'; expected a list of 2 numbers")]
)
def test_a_group_that_gets_the_wrong_values_together_has_no_scores(jail: Make, reward: str, says: str) -> None:
    made = jail(reward)
    first = made._cells[0].call(PROMPT, answers("a", "b"), TIMEOUT_S)
    assert isinstance(first, Failure)
    assert first.outcome is Outcome.BAD_VALUE
    assert says in first.detail
    assert outcomes(made.score(PROMPT, answers("a", "b"))) == [Outcome.BAD_VALUE] * 2


@pytest.mark.faults("F38")
def test_an_accident_is_retried_and_said(jail: Make, tmp_path: Path) -> None:
    verdicts = jail("fails_once", {"note": str(tmp_path / "note")}).score(PROMPT, answers("a", "b"))
    assert outcomes(verdicts) == [Outcome.SCORED] * 2
    assert all(v.retried for v in verdicts)


def test_the_rest_of_a_group_is_judged_together(jail: Make) -> None:
    """A reward that compares answers must not see them one by one."""
    verdicts = jail("Compares").score(PROMPT, answers("aa", "poison", "b", "ccc"))
    assert [v.scores.get("Compares") for v in verdicts] == [1 / 3, None, 0.0, 2 / 3]
    assert verdicts[1].outcome is Outcome.RAISED


def test_a_group_that_is_slow_as_a_whole_fails_as_a_whole(jail: Make) -> None:
    verdicts = jail("Slow").score(PROMPT, answers("0.2", "0.2", "0.2", "0.2"))
    assert outcomes(verdicts) == [Outcome.TIMEOUT] * 4


@pytest.mark.faults("F32")
def test_judging_ends_within_its_bound_whatever_happens(jail: Make) -> None:
    made = jail("swallows")
    made.start()
    began = time.monotonic()
    verdicts = made.score(PROMPT, answers(*["poison"] * 40))
    assert time.monotonic() - began < made.longest_s < 40 * (TIMEOUT_S + GRACE_S)
    assert outcomes(verdicts) == [Outcome.TIMEOUT] * 40


def test_other_groups_go_on_while_one_hangs(jail: Make) -> None:
    made = jail("hangs", processes=2, timeout_s=3.0)
    made.start()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(made.score, PROMPT, answers("poison"))
        for _ in range(50):
            assert outcomes(made.score(PROMPT, answers("fine"))) == [Outcome.SCORED]
        assert not hanging.done()
        made.close()
        with pytest.raises(JailClosed):
            hanging.result(10)


@pytest.mark.faults("F38")
def test_a_child_serves_many_groups_and_is_replaced_after_a_failure(jail: Make) -> None:
    made = jail("raises")
    made.start()
    child = made._cells[0]._child
    assert child is not None
    for _ in range(3):
        made.score(PROMPT, answers("fine"))
    assert made._cells[0]._child is child
    made.score(PROMPT, answers("poison", "fine"))
    assert made._cells[0]._child is not child
    assert gone(child.pid)


@pytest.mark.parametrize("reward", ["leaves_a_fork", "leaves_a_session"])
def test_what_a_reward_starts_ends_with_its_child(jail: Make, tmp_path: Path, reward: str) -> None:
    note = tmp_path / "pids"
    verdicts = jail(reward, {"note": str(note)}).score(PROMPT, answers("poison", "fine"))
    assert outcomes(verdicts)[1] is Outcome.SCORED
    assert outcomes(verdicts)[0] in (Outcome.CRASHED, Outcome.RAISED), "not a timeout: its end is noticed at once"
    pids = [int(line) for line in note.read_text().split()]
    assert len(pids) == 2  # in the group, and alone
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("reward", ["closes_stdout", "own_alarm", "starts_a_thread"])
def test_bad_manners_do_not_disturb_the_next_group(jail: Make, reward: str) -> None:
    made = jail(reward)
    for _ in range(3):
        assert outcomes(made.score(PROMPT, answers("a", "b"))) == [Outcome.SCORED] * 2
    if reward == "own_alarm":
        time.sleep(1.2)  # its alarm would have rung by now
        assert not made.score(PROMPT, answers("a"))[0].retried


def test_a_reward_that_comes_back_twice_is_heard_once(jail: Make) -> None:
    made = jail("comes_back_twice")
    for text in ("a", "bb", "ccc"):
        assert [v.scores for v in made.score(PROMPT, answers(text))] == [{"comes_back_twice": float(len(text))}]
        time.sleep(0.3)  # the copy comes back now, when nobody has asked


@pytest.mark.faults("F33")
def test_without_killing_from_outside_the_interpreter_is_held_past_the_deadline(jail: Make) -> None:
    """The negative control of SIGKILL: what an alarm alone does to a reward that blocks it."""
    made = jail("holds_the_interpreter", grace_s=math.inf)
    made.start()
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(made.score, PROMPT, answers("poison"))
        with pytest.raises(TimeoutError):
            hanging.result(TIMEOUT_S + 4 * GRACE_S)  # or the tests with SIGKILL prove nothing
        made.close()
        with pytest.raises(JailClosed):
            hanging.result(10)


def test_a_lost_keeper_is_replaced(jail: Make) -> None:
    made = jail("good")
    made.start()
    process, child = made._keeper._process, made._cells[0]._child
    assert process is not None
    assert child is not None
    os.kill(process.pid, signal.SIGKILL)
    assert gone(child.pid), "the kernel's parent-death signal ends the children of a killed keeper"
    verdicts = made.score(PROMPT, answers("42", "1"))
    assert [v.scores["good"] for v in verdicts] == [1.0, 0.0]


def test_the_thread_that_starts_the_jail_may_end(jail: Make) -> None:
    """The kernel's parent-death signal comes when the starting *thread* ends; only the process's end counts."""
    made = jail("good")
    thread = threading.Thread(target=made.start)
    thread.start()
    thread.join()
    process = made._keeper._process
    assert process is not None
    assert not gone(process.pid, within_s=0.3)
    assert not made.score(PROMPT, answers("42"))[0].retried


PARENT = """
import sys, time, threading
from rlkd.core.types import Answer, Finish, Prompt
import numpy as np
from rlkd.engines.jail import Jail
from rlkd.rewards.table import find, pack

reward = find(sys.argv[1] + ":hangs_with_a_session")
jail = Jail(pack({"hangs": reward(note=sys.argv[2])}), processes=2, timeout_s=600.0)
jail.start()
poison = [Answer("poison", Finish.STOP, 1)]
threading.Thread(target=jail.score, args=(Prompt("p", np.zeros(1, np.int32), ""), poison)).start()
time.sleep(0.5)
print(jail._keeper._process.pid, *(c._child.pid for c in jail._cells), flush=True)
time.sleep(600)
"""


def test_everything_dies_with_a_killed_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, PATHOLOGICAL, str(note)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        pids.append(int(note.read_text()))
        assert len(pids) == 4  # the keeper, two children of which one hangs, and what that one has started
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
    assert all(gone(pid) for pid in pids)


@pytest.mark.faults("F42")
def test_a_reward_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def score(prompt, answer):\n    return 1.0\n")
    rewards = pack({"mine": find(f"{mine}:score")()})
    mine.write_text("import a_module_that_is_nowhere\n")
    with pytest.raises(DataError, match="RLKD-D303") as caught:
        Jail(rewards).start()
    assert "a_module_that_is_nowhere" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.faults("F42")
@pytest.mark.parametrize(
    ("source", "says", "start_s"),
    [("import time; time.sleep(600)", "nothing came of it", 1.0), ("import os; os._exit(5)", "without a word", 60.0)],
)
def test_a_file_that_hangs_or_ends_the_process_on_import(
    tmp_path: Path, source: str, says: str, start_s: float
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def score(prompt, answer):\n    return 1.0\n")
    rewards = pack({"mine": find(f"{mine}:score")()})
    mine.write_text(source)
    with pytest.raises(DataError, match=says):
        Jail(rewards, start_s=start_s).start()


def test_closing_ends_everything(jail: Make) -> None:
    made = jail("good", processes=2)
    made.start()
    children = [c._child for c in made._cells]
    pids = [c.pid for c in children if c is not None]
    assert len(pids) == 2
    made.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(JailClosed):
        made.score(PROMPT, answers("42"))


@pytest.mark.faults("F42")
def test_probe_judges_the_gold_answer_and_a_wrong_one() -> None:
    prompts = [Prompt(f"p{i}", np.zeros(1, np.int32), str(i)) for i in range(5)]
    probes = probe(pack({"exact": find("exact")()}), prompts)
    assert [p.prompt.id for p in probes] == ["p0", "p1", "p2"]
    assert all([v.scores["exact"] for v in p.verdicts] == [1.0, 0.0] for p in probes)
    failing = probe(packed("raises"), prompts[:1], [answers("poison", "fine")], {"timeout_s": TIMEOUT_S})
    assert outcomes(failing[0].verdicts) == [Outcome.RAISED, Outcome.SCORED]


HOSTILE_MATH = [
    "9**9**9",
    r"\boxed{9^{9^{9}}}",
    r"\boxed{10^{10^{10^{10}}}}",
    r"the answer is $((7^{7})^{8})^{9}$",
    r"\boxed{100000!}",
    "\\boxed{" + "9" * 20_000 + "}",
    "\\boxed{" + "\\frac{1}{1+" * 300 + "1" + "}" * 301,
    "\\boxed{" + "\\frac{1}{1+" * 14 + "x" + "}" * 14 + "}",
    "\\boxed{" * 5000,
    "$" * 20_000,
    "{" * 20_000,
    r"\boxed{\sum_{n=1}^{10000} \sum_{m=1}^{10000} \frac{n^{99}}{m!}}",
    r"\boxed{\int_0^1 \int_0^1 \frac{\sin(x^{99} y^{98})}{\ln(x+y^{97})} dx dy}",
    "\\frac{" * 900,
    "answer " * 3000,
    "1+" * 5000 + "1",
]


@pytest.mark.faults("F35")
@pytest.mark.parametrize("text", HOSTILE_MATH, ids=lambda t: t[:24])
def test_mathematics_that_explodes_is_wrong_or_out_of_time_and_its_siblings_are_right(
    text: str, mathematics: Mapping[float, Jail]
) -> None:
    """On a machine so busy that the siblings need more than half a second, they get more."""
    for jail in mathematics.values():
        verdicts = jail.score(PROMPT, answers(r"\boxed{42}", text, "so the answer is 42.", r"\boxed{x+1}"))
        siblings = [v.scores.get("math") for v in (verdicts[0], verdicts[2], verdicts[3])]
        if None not in siblings:
            break
    assert siblings == [1.0, 1.0, 0.0]
    assert verdicts[1].outcome in (Outcome.SCORED, Outcome.TIMEOUT, Outcome.MEMORY)
    assert verdicts[1].scores.get("math") != 1.0


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Mapping[float, Jail]]:
    """By its timeout in seconds; a jail starts its children at its first call."""
    rewards = pack({"math": find("math")()})
    made = {t: Jail(rewards, timeout_s=t, grace_s=GRACE_S) for t in (TIMEOUT_S, 8 * TIMEOUT_S, 32 * TIMEOUT_S)}
    yield made
    for jail in made.values():
        jail.close()
