"""What the terminal shows: live, plain, narrow, and gone."""

import io
import os
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from rlkd.report import words
from rlkd.report.progress import Progress
from tests.report_help import Gone, Terminal, evaluated, feed, plain_progress, report

ROW = {
    "step": 7,
    "reward/mean": 0.31,
    "kl_reference": 0.013,
    "mismatch/mean": 1.2e-4,
    "length/mean": 18.2,
    "truncated": 0.02,
    "unjudged": 3.0,
    "seconds/step": 3.9,
    "seconds/rollout": 2.1,
    "seconds/learn": 1.0,
    "seconds/sync": 0.05,
}
SAMPLE = {"question": "12+7=?", "answer": "19", "reward": 1.0, "right": True, "advantage": 0.81}


def test_one_line_a_step_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress, stream = plain_progress()
    r = report(tmp_path, progress=progress)
    r.evaluation(0, evaluated(156))
    feed(r, 1, reward=0.0, kl_reference=0.5)
    feed(r, 2, reward=1.0)
    _, first, second = stream.getvalue().splitlines()
    assert first.startswith("step 1/20  reward 0.25 (+0.00)  pass@1 0.31  kl 0.5  len 3  trunc 0%  ")
    assert first.endswith("s/step  rollout 0.2 verify 0.1 learn 0.4 sync 0.1")
    assert "reward 0.50 (+0.25)" in second
    assert "\x1b" not in stream.getvalue()
    assert capsys.readouterr().out == ""  # stdout is for results


def test_the_words_of_a_step() -> None:
    assert words.headline(ROW, 0.19, 0.28) == [
        "reward 0.31 (+0.12)", "pass@1 0.28", "kl 0.013", "mismatch 0.00012", "len 18", "trunc 2%", "unjudged 3",
        "3.9 s/step",
    ]  # fmt: skip
    assert words.headline({"reward/mean": None}, None, None) == ["reward –", "len –", "trunc –", "– s/step"]
    assert words.stage_bars(ROW) == ["rollout ████████ 2.1 s", "learn ███▊ 1.0 s", "sync ▎ 0.1 s"]
    assert words.sample_line(SAMPLE) == '✔ 1.00  adv +0.81  "12+7=?" → "19"'


def test_bars() -> None:
    assert [words.blocks(f, 2) for f in (0.0, 1e-6, 0.5, 1.0, 7.0)] == ["", "▏", "█", "██", "██"]
    assert words.progress_bar(0, 4, 4) == "────"
    assert words.progress_bar(3, 8, 4) == "━╸──"
    assert words.progress_bar(9, 8, 4) == "━━━━"


@pytest.mark.parametrize("width", [10, 25, 40, 60, 80, 200])
def test_every_width_shows_everything_and_overflows_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress(20, Terminal(), live=False)
    progress.group()
    progress.step(ROW, {**SAMPLE, "answer": "長い答え" * 40})
    progress.group()
    lines = progress._picture().plain.splitlines()
    assert max(map(cell_len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    if width >= 40:
        for piece in ("reward 0.31", "kl 0.013", "rollout", "sync", "next: 1 groups", "3.9 s/step", "sample"):
            assert piece in text
        assert "…" in lines[-1]


def test_before_the_first_step_there_is_something_to_see() -> None:
    progress = Progress(20, Terminal(), live=False)
    progress.group()
    assert progress._picture().plain.split() == ["step", "0/20", "─" * 20, "next:", "1", "groups"]


def test_live_on_a_terminal_and_what_is_said_stays() -> None:
    stream = Terminal()
    progress = Progress(20, stream, live=True)
    progress.step(ROW, SAMPLE)
    progress.say("[warning] look [bold]here[/bold]")
    progress.close()
    progress.say("after the end")
    text = stream.getvalue()
    assert "[warning] look [bold]here[/bold]" in text
    assert "reward 0.31" in text
    assert text.endswith("after the end\n")


def test_what_a_model_writes_does_not_command_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;title\x07\r\nnext\u202eline"
    line = words.sample_line({**SAMPLE, "answer": evil})
    assert line.isprintable()
    assert "�[2J" in line
    assert words.one_line("a" * 300 + "42", 5) == '"…aaa42"'


@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_goes_away_does_not_end_the_run(
    tmp_path: Path, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich's end of the program would also close pytest's stdout
    out = sys.stdout
    terminal = Gone()
    terminal.closed_window = False
    r = report(tmp_path, progress=Progress(20, terminal, live=live))
    assert (sys.stdout is not out) == live
    terminal.closed_window = True
    feed(r, 1)
    r.event("warning", "nobody sees this")
    assert sys.stdout is out  # rich gave it back
    r.close()
    with pytest.raises(SystemExit):  # what rich does without the protection
        Console(file=Gone()).print("x")


def test_live_needs_two_terminals_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    live = Progress(1, Terminal())
    assert live._live is not None
    live.close()
    assert Progress(1, io.StringIO())._live is None
    monkeypatch.setenv("TERM", "dumb")
    assert Progress(1, Terminal())._live is None
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert Progress(1, Terminal())._live is None


def test_steps_without_samples_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    progress = Progress(20, Terminal(), live=False)
    r = report(tmp_path, progress=progress)
    r.step(1, [], {}, {})
    assert "reward –" in progress._picture().plain
