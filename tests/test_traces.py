"""Live traces: each text is asked for once, paid for once, judged once, and kept."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkd.core.errors import BudgetReached, WorkerLost
from rlkd.core.ports import Traces, Written
from rlkd.core.types import Demonstration, Finish, Origin, Prompt, Sample
from rlkd.train.traces import LiveTraces
from tests.toys import prompt_of

EOS = 0


@dataclass
class Says:
    """A teacher: says `text`, perhaps slowly, perhaps after it was lost a few times."""

    text: str = "right"
    finish: Finish = Finish.STOP
    lost: int = 0
    error: Exception | None = None
    seeds: list[int] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def write(self, messages: Sequence[Mapping[str, str]], seed: int = 0) -> Written:
        self.seeds.append(seed)
        self.heard.append([dict(m) for m in messages])
        await (asyncio.sleep(0) if self.gate is None else self.gate.wait())
        if self.error is not None:
            raise self.error
        if len(self.seeds) <= self.lost:
            raise WorkerLost("teacher died (on purpose)")
        return Written(self.text, self.finish, len(self.text))


@dataclass
class Judge:
    """1 for answers that begin with `r`; may be lost, or unable to judge."""

    lost: int = 0
    unjudged: bool = False
    seen: list[Sample] = field(default_factory=list)

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        self.seen += samples
        await asyncio.sleep(0)
        if len(self.seen) <= self.lost:
            raise WorkerLost("verifier died (on purpose)")
        right = [chr(s.tokens[len(prompt.tokens)]) == "r" for s in samples]
        return tuple(
            replace(s, reward=math.nan if self.unjudged else float(r)) for s, r in zip(samples, right, strict=True)
        )


def tokens_of(_: Prompt, text: str) -> Any:
    return "characters nobody knows" if "?" in text else np.array([*map(ord, text), EOS], np.int32)


def traces(tmp: Path, judge: Judge | None = None, told: list[str] | None = None, **writers: Says) -> LiveTraces:
    kept = told if told is not None else []
    path = tmp / "run" / "traces.jsonl"
    return LiveTraces(writers, tokens_of, judge or Judge(), path, 10, 15, report=lambda _, text: kept.append(text))


def rows(tmp: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp / "run" / "traces.jsonl").read_text().splitlines()]


def texts(found: Sequence[Demonstration]) -> list[tuple[str, str]]:
    return [(d.teacher, "".join(map(chr, d.tokens[:-1]))) for d in found]


def ask(made: LiveTraces, prompt: Prompt | None = None) -> list[tuple[str, str]]:
    return texts(asyncio.run(made(prompt or prompt_of())))


def test_stored_ones_first_then_the_right_ones_of_live_teachers(tmp_path: Path) -> None:
    stored = Demonstration("book", np.array([98, EOS], np.int32), 0.3)
    judge = Judge()
    made = traces(tmp_path, judge, a=Says("right a"), b=Says("wrong"), c=Says("right c"))
    assert isinstance(made, Traces)
    found = asyncio.run(made(replace(prompt_of(), demonstrations=(stored,))))
    assert texts(found) == [("book", "b"), ("a", "right a"), ("c", "right c")]
    assert [d.quality for d in found] == [0.3, 1.0, 1.0]
    assert all(d.tokens[-1] == EOS for d in found)
    assert judge.seen[0].origin.tolist() == [Origin.PROMPT] * 3 + [Origin.TEACHER] * 8
    assert {r["teacher"]: r["reward"] for r in rows(tmp_path)} == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert made.counts == {"written": 3, "right": 2, "not_right": 1}


def test_without_teachers_what_is_stored(tmp_path: Path) -> None:
    stored = Demonstration("book", np.array([98, EOS], np.int32))
    assert ask(traces(tmp_path), replace(prompt_of(), demonstrations=(stored,))) == [("book", "b")]
    assert not (tmp_path / "run").exists()


def test_nobody_is_asked_twice_not_even_by_a_resumed_run(tmp_path: Path) -> None:
    right, wrong = Says("right"), Says("wrong")
    for _ in range(2):
        judge = Judge()
        made = traces(tmp_path, judge, a=right, b=wrong)
        for _ in range(2):
            assert ask(made) == [("a", "right")]
    assert (len(right.seeds), len(wrong.seeds)) == (1, 1)
    assert judge.seen == []  # the rewards were kept too
    assert len(rows(tmp_path)) == 2
    ask(made, prompt_of(name="q"))
    assert len(right.seeds) == 2


def test_teachers_hear_the_messages_and_get_seeds_of_their_own(tmp_path: Path) -> None:
    a, b = Says(), Says()
    ask(traces(tmp_path, a=a, b=b))
    assert a.heard == [[{"role": "user", "content": "question p"}]]
    assert a.seeds != b.seeds
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    ask(traces(tmp_path, a=a), replace(prompt_of(name="q"), messages=chat))
    assert a.heard[1] == list(chat)


def test_calls_at_once_ask_once(tmp_path: Path) -> None:
    a = Says()

    async def run() -> list[Any]:
        a.gate = asyncio.Event()
        made = traces(tmp_path, a=a)
        tasks = [asyncio.create_task(made(prompt_of())) for _ in range(5)]
        await asyncio.sleep(0.01)
        a.gate.set()
        return await asyncio.gather(*tasks)

    assert [texts(f) for f in asyncio.run(run())] == [[("a", "right")]] * 5
    assert len(a.seeds) == 1


def test_if_the_first_of_them_gives_up_the_next_asks(tmp_path: Path) -> None:
    a = Says()

    async def run() -> Any:
        a.gate = asyncio.Event()
        made = traces(tmp_path, a=a)
        first, second = (asyncio.create_task(made(prompt_of())) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        a.gate.set()
        return await second

    assert texts(asyncio.run(run())) == [("a", "right")]


def test_a_lost_teacher_is_told_and_what_others_wrote_is_kept(tmp_path: Path) -> None:
    a, b = Says("right a"), Says("right b", lost=1)
    made = traces(tmp_path, a=a, b=b)
    with pytest.raises(WorkerLost):
        ask(made)
    assert ask(made) == [("a", "right a"), ("b", "right b")]
    assert (len(a.seeds), len(b.seeds)) == (1, 2)


def test_what_asking_again_cannot_mend_is_told_before_a_lost_worker(tmp_path: Path) -> None:
    made = traces(tmp_path, a=Says(lost=9), b=Says(error=BudgetReached("RLKD-I720", "spent")))
    with pytest.raises(BudgetReached):
        ask(made)


def test_a_text_whose_judge_was_lost_is_kept_and_judged_later(tmp_path: Path) -> None:
    a, judge = Says(), Judge(lost=1)
    made = traces(tmp_path, judge, a=a)
    with pytest.raises(WorkerLost):
        ask(made)
    assert [r["reward"] for r in rows(tmp_path)] == [None]
    assert ask(traces(tmp_path, judge, a=a)) == [("a", "right")]
    assert [r["reward"] for r in rows(tmp_path)] == [None, 1.0]
    assert ask(traces(tmp_path, Judge(unjudged=True), a=a)) == [("a", "right")]
    assert len(a.seeds) == 1


def test_an_unjudged_text_is_not_taken(tmp_path: Path) -> None:
    assert ask(traces(tmp_path, Judge(unjudged=True), a=Says())) == []
    assert [r["reward"] for r in rows(tmp_path)] == [None]


@pytest.mark.parametrize(
    ("teacher", "why", "kept"),
    [
        (Says("r" * 10), "11 tokens, over the 10", 1),
        (Says("right", Finish.LENGTH), "cut before its end", 1),
        (Says("r?"), "characters nobody knows", 1),
        (Says("", Finish.LENGTH), None, 0),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted_once(
    tmp_path: Path, teacher: Says, why: str | None, kept: int
) -> None:
    told: list[str] = []
    judge = Judge()
    made = traces(tmp_path, judge, told, a=teacher)
    assert ask(made) == ask(made) == []
    assert judge.seen == []
    assert len(told) == made.counts["left_out"] == kept
    assert why is None or f"a: its answer to p is left out: {why}" in told[0]
    assert not kept or len(rows(tmp_path)) == 1


def test_prompt_and_trace_must_fit_into_the_context(tmp_path: Path) -> None:
    told: list[str] = []
    assert ask(traces(tmp_path, told=told, a=Says()), prompt_of(10)) == []
    assert "6 tokens, over the 5 there is room for" in told[0]
    assert ask(traces(tmp_path, a=Says()), prompt_of(9, "q")) == [("a", "right")]


def test_a_torn_last_line_is_taken_out_and_counted(tmp_path: Path) -> None:
    a, told = Says(), []
    ask(traces(tmp_path, a=a))
    ask(traces(tmp_path, a=a), prompt_of(name="q"))
    path = tmp_path / "run" / "traces.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    made = traces(tmp_path, told=told, a=a)
    assert made.counts["torn"] == 1
    assert "unfinished last line" in told[0]
    assert ask(made) == ask(made, prompt_of(name="q")) == [("a", "right")]
    assert len(a.seeds) == 3  # q is asked again, p is not
    assert [r["id"] for r in rows(tmp_path)] == ["p", "q"]


def test_lines_that_are_no_traces_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "traces.jsonl"
    path.parent.mkdir()
    path.write_text('[1]\n{"id": "p"}\nnonsense\n')
    told: list[str] = []
    made = traces(tmp_path, told=told, a=Says())
    assert made.counts["unreadable"] == len(told) == 3
    assert ask(made) == [("a", "right")]


def test_a_disk_that_takes_nothing_costs_the_memory_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    told: list[str] = []
    a = Says()
    made = LiveTraces({"a": a}, tokens_of, Judge(), tmp_path / "run" / "x" / "t.jsonl", 10, 15,
                      report=lambda _, text: told.append(text))  # fmt: skip
    assert ask(made) == ask(made) == [("a", "right")]
    assert len(a.seeds) == len(told) == 1
