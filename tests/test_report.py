"""What a run tells: rows, samples, evaluations, events, and how they survive kills and full disks."""

import errno
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rlkd.core.types import Group
from rlkd.report import plot
from rlkd.report.files import Lines, read_lines, replace_file
from rlkd.report.history import History, latest
from rlkd.report.metrics import Observed
from rlkd.report.samples import shown
from rlkd.report.summary import readable, summary
from tests.report_help import cut_off, evaluated, feed, guided, plain_progress, report
from tests.toys import group_of


def rows(directory: Path) -> list[dict]:  # type: ignore[type-arg]
    return read_lines(directory / "metrics.jsonl")


def observed(*groups: Group) -> dict[str, float]:
    numbers = Observed(success=0.5)
    for group in groups:
        numbers.add(group, {"rollout": 1.0})
    return numbers.row()


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.faults("F46")
def test_numbers_of_finished_groups() -> None:
    mixed = group_of([1.0, 0.0], [3, 5])
    mixed = replace(mixed, samples=(mixed.samples[0], cut_off(mixed.samples[1])))
    scored = group_of([1.0, 1.0], [2, 2])
    scored = replace(scored, samples=tuple(replace(s, scores={"math": 1.0, "format": 0.5}) for s in scored.samples))
    row = observed(mixed, scored, group_of([0.0, 0.0], [4, 4]))
    assert row["reward/mean"] == row["right"] == 0.5
    assert row["length/mean"] == pytest.approx(20 / 6)
    assert row["length/max"] == 5
    assert row["truncated"] == pytest.approx(1 / 6)
    assert (row["score/math"], row["score/format"]) == (1.0, 0.5)
    assert [row[f"groups/{k}"] for k in ("all_right", "all_wrong", "mixed")] == pytest.approx([1 / 3] * 3)
    assert (row["groups/finished"], row["unjudged"], row["guided"]) == (3, 0, 0)
    assert row["group_seconds/rollout"] == row["group_seconds/rollout/max"] == 1.0


def test_help_is_not_counted_as_the_policys_own_work() -> None:
    group = group_of([0.0, 0.0, 1.0], [3, 3, 3])
    group = replace(group, samples=(*group.samples[:2], guided(group.samples[2])))
    row = observed(group)
    assert (row["reward/mean"], row["reward/guided"]) == (0.0, 1.0)
    assert row["guided"] == pytest.approx(1 / 3)
    assert row["groups/all_wrong"] == 1.0


def test_unjudged_samples_are_counted_and_in_no_mean() -> None:
    row = observed(group_of([1.0, math.nan], [3, 300]))
    assert (row["reward/mean"], row["unjudged"], row["length/mean"], row["groups/all_right"]) == (1.0, 1, 3.0, 1.0)


def test_nothing_finished_is_unknown_not_zero() -> None:
    row = observed(group_of([], []))
    assert math.isnan(row["reward/mean"])
    assert math.isnan(row["truncated"])
    assert math.isnan(row["groups/all_wrong"])


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_row_a_step_readable_while_running(tmp_path: Path) -> None:
    r = report(tmp_path, attempt=3)
    feed(r, 1, staleness=0.0)
    (row,) = rows(tmp_path)  # not closed yet
    assert (row["step"], row["version"], row["attempt"], row["loss"]) == (1, 0, 3, 0.1)
    assert row["batch/groups"] == 2
    assert row["batch/samples"] == 4
    assert row["batch/tokens"] == 12
    assert row["seconds/learn"] == 0.4
    assert row["samples_per_second"] > 0
    assert list(row) == sorted(row)
    assert row["time"].endswith("+00:00")
    feed(r, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    r.close()
    r.close()


def test_unknown_and_infinite_are_null_and_infinite_is_told(tmp_path: Path) -> None:
    r = report(tmp_path)
    feed(r, 1, kl=math.nan, grad_norm=math.inf)
    r.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert rows(tmp_path)[0]["kl"] is None
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert event["text"] == "step 1: infinite: grad_norm"


def test_a_name_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    r = report(tmp_path)
    feed(r, 1, **{"length/mean": 99.0, "version": 5.0})
    (row,) = rows(tmp_path)
    assert (row["length/mean"], row["learner/length/mean"]) == (3.0, 99.0)
    assert (row["version"], row["learner/version"]) == (0, 5.0)


def test_every_step_starts_counting_anew(tmp_path: Path) -> None:
    r = report(tmp_path)
    feed(r, 1, reward=1.0)
    r.event("unjudged", "2 samples could not be judged", samples=2)
    feed(r, 2, reward=0.0)
    r.step(3, [group_of([1.0], [2])], {}, {})
    first, second, third = rows(tmp_path)
    assert (first["reward/mean"], first["unjudged"]) == (0.5, 0)
    assert (second["reward/mean"], second["unjudged"]) == (0.25, 2)
    assert (third["reward/mean"], third["batch/reward"]) == (None, 1.0)


@pytest.mark.faults("F66")
def test_durations_do_not_believe_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    r = report(tmp_path)
    now[0] += 60.0  # start of workers, first evaluation
    wall = iter([2e9, 2e9 - 3600, 2e9 + 3600, 2e9, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(wall))
    for step, timings in ((1, {"learn": 1.0}), (2, {"learn": 1.0, "evaluate": 30.0, "save": 10.0})):
        now[0] += 4.0 + timings.get("evaluate", 0.0) + timings.get("save", 0.0)
        r.observe(group_of([1.0], [2]), {"rollout": 3.0, "verify": 1.0})
        r.step(step, [group_of([1.0], [2])], {}, timings)
    # the first step began with its first group; evaluations and saves are no part of a step
    assert [row["seconds/step"] for row in rows(tmp_path)] == [4.0, 4.0]
    assert [row["elapsed"] for row in rows(tmp_path)] == [64.0, 108.0]


# ── attempts, kills, disks ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_cut_by_a_kill_is_taken_out_and_told(tmp_path: Path) -> None:
    r = report(tmp_path)
    feed(r, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"step": 2, "rew')  # no close: killed
    assert [row["step"] for row in rows(tmp_path)] == [1]  # a reader is not confused either
    again = report(tmp_path, attempt=2)
    feed(again, 2)
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert read_lines(tmp_path / "events.jsonl")[0]["line"] == '{"step": 2, "rew'


def test_a_cut_line_of_any_length(tmp_path: Path) -> None:
    for length in (1, 1 << 16, 200_000):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(b'{"a": 1}\n' + b"x" * length)
        lines = Lines(path)
        assert lines.cut == "x" * length
        lines.write({"b": 2})
        assert read_lines(path) == [{"a": 1}, {"b": 2}]
    path.write_bytes(b"only a cut line")
    assert Lines(path).cut == "only a cut line"
    assert path.read_bytes() == b""


def test_later_attempts_make_steps_void(tmp_path: Path) -> None:
    r = report(tmp_path)
    for step in (1, 2, 3, 4):
        feed(r, step)
    r.evaluation(4, evaluated(400))
    again = report(tmp_path, attempt=2)  # from a checkpoint after step 2
    feed(again, 3)
    history = History.read(tmp_path)
    assert [(row["step"], row["attempt"]) for row in history.rows] == [(1, 1), (2, 1), (3, 2)]
    assert history.evaluations == {}  # the one after step 4 is of weights that are no more
    assert len(rows(tmp_path)) == 5  # nothing was deleted
    assert latest([{"step": 1}, {"step": 2}, {"step": 1}]) == [{"step": 1}]


def test_a_full_disk_leaves_no_half_line_and_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, stream = plain_progress()
    r = report(tmp_path, progress=progress)
    feed(r, 1)
    real = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 10:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    feed(r, 2)
    feed(r, 3)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    monkeypatch.setattr(os, "write", real)
    feed(r, 4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert stream.getvalue().count("No space left on device; rows are held") == 1
    assert stream.getvalue().count("metrics are written again") == 1


def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, stream = plain_progress()
    r = report(tmp_path, progress=progress)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        feed(r, 1)
        r.close()
    assert "1 rows could not be written" in stream.getvalue()


def test_samples_that_cannot_be_written_do_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where a folder should be")
    r = report(tmp_path)
    feed(r, 1)
    assert len(rows(tmp_path)) == 1
    assert "the run goes on" in read_lines(tmp_path / "events.jsonl")[0]["text"]


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a row of json"):
        History.read(tmp_path)


def test_replacing_a_file_leaves_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "x", "old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(tmp_path / "x", "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


# ── samples ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_are_readable(tmp_path: Path) -> None:
    r = report(tmp_path)
    group = group_of([1.0, 0.0], [2, 3])
    first = replace(group.samples[0], scores={"math": 1.0}, advantage=np.full(5, 0.7, np.float32))
    second = replace(cut_off(group.samples[1]), advantage=np.arange(6, dtype=np.float32))
    group = replace(group, samples=(first, second), prompt=replace(group.prompt, seed=77))
    r.step(7, [group], {}, {})
    (record,) = read_lines(tmp_path / "samples" / "step-000007.jsonl")
    assert (record["id"], record["question"], record["answer"], record["seed"]) == ("p", "question p", "x", 77)
    one, two = record["samples"]
    assert (one["text"], one["tokens"], one["reward"], one["scores"]) == ("t10 t11", [10, 11], 1.0, {"math": 1.0})
    assert one["advantage"] == pytest.approx(0.7)
    assert "advantages" not in one
    assert (two["finish"], two["advantage"], two["advantages"]) == ("length", 4.0, [3.0, 4.0, 5.0])
    assert (one["versions"], one["guided"]) == ([0, 0], False)


def test_samples_shown_reach_from_worst_to_best() -> None:
    groups = [group_of([r, r], [1, 1]) for r in (0.5, 0.9, 0.1, 0.7, 0.3)]
    assert [float(g.rewards[0]) for g in shown(groups, 3)] == pytest.approx([0.1, 0.5, 0.9])
    assert shown(groups, 9) == groups
    assert shown(groups, 0) == []


def test_no_samples_when_none_are_asked_for(tmp_path: Path) -> None:
    r = report(tmp_path, samples_per_step=0)
    feed(r, 1)
    assert not (tmp_path / "samples").exists()


def test_text_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    r = report(tmp_path)
    r.decode = lambda _: "half a \ud83d character \x1b[2J\n"
    r.step(1, [group_of([1.0], [2])], {}, {})
    (record,) = read_lines(tmp_path / "samples" / "step-000001.jsonl")
    assert record["samples"][0]["text"] == "half a ? character \x1b[2J\n"


# ── events and evaluations ───────────────────────────────────────────────────────────────────────────────────────────


def test_events_are_kept_and_shown(tmp_path: Path) -> None:
    progress, stream = plain_progress()
    r = report(tmp_path, progress=progress)
    r.event("worker_lost", "rollout-0 died", ticket=3)
    r.event("checkpoint", "saved step 5", step=5)
    lost, saved = read_lines(tmp_path / "events.jsonl")
    assert (lost["kind"], lost["ticket"], lost["attempt"], saved["step"]) == ("worker_lost", 3, 1, 5)
    assert stream.getvalue() == "[worker_lost] rollout-0 died\n"


def test_a_flood_of_events_is_kept_whole_and_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress, stream = plain_progress()
    r = report(tmp_path, progress=progress)
    for i in range(100):
        r.event("unjudged", f"prompt {i}")
    r.event("warning", "another kind")
    now[0] = 60.0
    r.event("unjudged", "later")
    for i in range(7):
        r.event("unjudged", f"again {i}")
    r.close()
    assert len(read_lines(tmp_path / "events.jsonl")) == 109
    said = stream.getvalue().splitlines()
    assert said[:5] == [f"[unjudged] prompt {i}" for i in range(5)]
    assert said[5:7] == ["[warning] another kind", "[unjudged] later   (and 95 more before, see events.jsonl)"]
    assert said[-1] == "[unjudged] 3 more, see events.jsonl"


def test_an_evaluation_is_a_file(tmp_path: Path) -> None:
    progress, stream = plain_progress()
    r = report(tmp_path, progress=progress)
    r.evaluation(0, evaluated(156))
    record = json.loads((tmp_path / "eval" / "step-000000.json").read_text())
    assert record["eval/pass@1"] == 0.312
    assert record["estimates"][0]["interval"] == "wilson"
    assert "held out after step 0: pass@1 0.312 [0.273, 0.354]" in stream.getvalue()
    assert progress.pass_at_1 == 0.312
    assert History.read(tmp_path).pass_at(1)[0][0] == 0.312


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_summary_says_before_after_speed_and_where(tmp_path: Path) -> None:
    r = report(tmp_path / "demo")
    r.evaluation(0, evaluated(156))
    for step in range(1, 21):
        feed(r, step, reward=step / 20)
    r.evaluation(20, evaluated(421))
    text = r.summary()
    r.close()
    assert (
        "pass@1 on 500 held-out prompts: 0.312 [0.273, 0.354] → 0.842 [0.807, 0.871]   (95 % intervals do not overlap)"
        in text
    )
    assert "— rollout 0.25 · verify 0.10 · learn 0.40 · sync 0.05" in text
    assert "seconds per step (median of 20): " in text
    assert "samples per second: " in text
    assert "(80 trained in " in text
    for place in ("metrics.jsonl", "samples", "events.jsonl", "reward.svg"):
        assert str(tmp_path / "demo" / place) in text
    assert "● held-out pass@1" in text
    assert "model " not in text
    assert f"model    {tmp_path}" in summary(tmp_path / "demo", model=tmp_path)


def test_summary_does_not_claim_what_it_does_not_know(tmp_path: Path) -> None:
    r = report(tmp_path)
    assert r.summary() == f"run      {tmp_path}\nmetrics  {tmp_path}/metrics.jsonl\nevents   {tmp_path}/events.jsonl"
    r.evaluation(0, evaluated(250))
    r.evaluation(5, evaluated(255))
    assert "0.510 [0.466, 0.554]   (95 % intervals overlap)" in r.summary()
    r.evaluation(6, evaluated(0, prompts=0))
    assert "→ unknown" in r.summary()


def test_summary_where_the_terminal_has_only_ascii(tmp_path: Path) -> None:
    r = report(tmp_path)
    for step in (1, 2, 3):
        feed(r, step, reward=0.3 * step)
    r.evaluation(3, evaluated(400))
    text = summary(tmp_path, encoding="ascii")
    assert text.isascii()
    assert "?" not in text
    assert "*" in text
    assert readable("⠿●→", "utf-8") == "⠿●→"


@pytest.mark.parametrize("width", [30, 72, 200])
def test_terminal_curve_fits_and_is_where_it_should_be(width: int) -> None:
    made = [{"step": i + 1, "reward/mean": i / 29} for i in range(30)]
    point = {"k": 1, "value": 0.5, "low": 0.4, "high": 0.6}
    lines = plot.terminal(History(made, {15: {"estimates": [point]}}), width, 15).splitlines()
    assert max(map(len, lines[:17])) <= width
    assert not any(line.endswith(" ") for line in lines)
    assert lines[0].rstrip()[-1] > "⠀"  # the end of the curve is at the top right
    assert lines[0].startswith("  1.00 ┤")
    assert lines[14].startswith("  0.00 ┤")
    assert "●" in lines[7]  # one half


def test_curves_of_anything() -> None:
    assert plot.terminal(History([], {})) == ""
    odd = [{"step": 1, "reward/mean": None}, {"step": 2, "reward/mean": -3.0}, {"step": 3, "reward/mean": 1e6}]
    for some in (odd[:1], odd):
        assert plot.terminal(History(some, {}))
        ElementTree.fromstring(plot.svg(History(some, {}), "a <b> & c"))


def test_smoothing_has_no_lag_and_leaves_out_the_unknown() -> None:
    assert plot.smoothed([0.0, 1.0, 2.0, 3.0, 4.0], 3) == [0.5, 1, 2, 3, 3.5]
    assert plot.smoothed([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(plot.smoothed([math.nan], 3)[0])


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    r = report(tmp_path)
    for step in (1, 2, 3):
        feed(r, step)
    r.evaluation(3, evaluated(421))
    r.close()
    root = ElementTree.fromstring((tmp_path / "reward.svg").read_text())
    tags = [element.tag.rsplit("}")[-1] for element in root]
    assert tags.count("polyline") == 2
    assert tags.count("circle") == 1
