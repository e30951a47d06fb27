"""One attempt of a run: held alone, written down, ended with a reason; and whether it may go on in a folder."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rlkd import attempt as attempts
from rlkd import exits, fingerprint, lease
from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.core import errors
from rlkd.core.stop import Stop, StopRequest
from rlkd.fingerprint import Change, Comparison
from rlkd.lease import Holder, held, holder
from tests.test_cli import environment

RECIPE = """
model: {path: models/tiny}
data: {train: {kind: arithmetic, size: 16}}
algorithm: {name: grpo}
rewards: {arithmetic: {}}
evaluate: {at_start: false, at_end: false}
name: demo
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return load("recipe.yaml", ["learner.lr=1e-4", "schedule.steps=64"])


@pytest.fixture
def run(config: Config) -> Path:
    return attempts.run_directory(config)


def quiet(*_: object) -> None:
    """Says nothing, hears nothing."""


def committed(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").touch()


def opened(run: Path, config: Config, stop: Stop | None = None) -> Any:
    return attempts.opened(run, config, Path("recipe.yaml"), stop or Stop(), quiet)


def exit_of(run: Path, number: int = 1) -> dict[str, Any]:
    return dict(json.loads((run / "attempts" / f"{number:04d}" / "exit.json").read_text()))


# -- how it ends

COMMAND = "rlkd train recipe.yaml learner.lr=1e-4 schedule.steps=64"


def test_a_run_that_is_done(run: Path, config: Config) -> None:
    with opened(run, config) as attempt:
        attempt.step = lambda: 8
        committed(run, 4, 8)
        assert (there := holder(run)) is not None
        assert there.pid == os.getpid()
    assert exit_of(run) == {
        "code": 0, "class": "done", "cause": "the last step is done", "hint": None, "step": 8, "saved": 8, "attempt": 1,
        "resume_command": COMMAND,
    }  # fmt: skip
    (entry,) = json.loads((run / "run.json").read_text())["attempts"]
    assert (entry["attempt"], entry["exit"], entry["pid"]) == (1, 0, os.getpid())
    environment = json.loads((run / "attempts" / "0001" / "env.json").read_text())
    assert environment["packages"]["torch"] == entry["packages"]["torch"]
    assert holder(run) is None


@pytest.mark.faults("F15")
@pytest.mark.parametrize(
    ("error", "kind", "code", "class_", "says"),
    [
        (errors.ConfigError("RLKD-C1", "a", fix="b"), None, 2, "config", "When that is mended"),
        (errors.PreflightError("RLKD-E1", "a"), None, 3, "config", "When that is mended"),
        (errors.DataError("RLKD-D1", "a"), None, 4, "data", "When that is mended"),
        (errors.DivergedError("RLKD-T1", "a"), None, 5, "config", "When that is mended"),
        (errors.InfrastructureError("RLKD-I1", "a"), None, 6, "infra", "when the machines are well again"),
        (errors.BudgetReached("RLKD-I720", "a"), None, 6, "config", "When that is mended"),
        (errors.NodesGone("RLKD-I9", "a"), None, 75, "preempt", "Give the same command again"),
        (errors.CheckpointError("RLKD-K1", "a"), None, 7, "data", "When that is mended"),
        (errors.Stopped(75, "saved"), "user", 75, "user", "The same command goes on there"),
        (errors.Stopped(75, "saved"), "signal", 75, "preempt", "Give the same command again"),
        (errors.Stopped(75, "saved"), "drain", 75, "preempt", "Give the same command again"),
        (errors.Stopped(75, "saved"), "deadline", 75, "preempt", "Give the same command again"),
        (KeyboardInterrupt(), None, 130, "user", "The same command goes on there"),
        (ZeroDivisionError("oh"), None, 1, "bug", "The same command goes on there"),
    ],
)
def test_every_end_is_written_down_and_told(
    run: Path, config: Config, error: BaseException, kind: str | None, code: int, class_: str, says: str
) -> None:
    stop = Stop()
    if kind is not None:
        stop.ask(StopRequest(kind, "x"))
    committed(run, 40)
    (run / "run.json").write_text('{"attempts": []}')
    with pytest.raises(type(error)) as caught, opened(run, config, stop) as attempt:  # noqa: PT012
        attempt.step = lambda: 41
        raise error
    end = exit_of(run)
    assert (end["code"], end["class"], end["step"], end["saved"]) == (code, class_, 41, 40)
    assert json.loads((run / "run.json").read_text())["attempts"][0]["exit"] == code
    (note,) = caught.value.__notes__
    first = f"Attempt 1 ended after step 41 ({class_}, exit {code}); the checkpoint of step 40 stands. "
    assert note.startswith(first)
    assert says in note
    assert COMMAND in note
    assert note.endswith(f"More: {run / 'attempts' / '0001' / 'exit.json'}")


def test_what_ended_before_anything_was_trained_starts_again(run: Path, config: Config) -> None:
    with pytest.raises(errors.DataError) as caught, opened(run, config):
        raise errors.DataError("RLKD-D1", "no rows", fix="other rows")
    assert exit_of(run)["saved"] is None
    assert (exit_of(run)["cause"], exit_of(run)["hint"]) == ("RLKD-D1: no rows", "other rows")
    (note,) = caught.value.__notes__
    assert "no checkpoint was written. When that is mended, the same command starts again" in note


def test_every_exit_code_has_a_class() -> None:
    assert set(exits.CLASSES) == {0, 1, 2, 3, 4, 5, 6, 7, 75, 130}


def test_a_full_disk_does_not_hide_the_error(run: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(errors.DataError) as caught, opened(run, config):  # noqa: PT012
        monkeypatch.setattr(attempts, "replace_file", full)
        raise errors.DataError("RLKD-D1", "a")
    assert caught.value.__notes__


def test_attempts_are_counted(run: Path, config: Config) -> None:
    for number in (1, 2, 3):
        with opened(run, config) as attempt:
            assert attempt.number == number
    assert sorted(p.name for p in (run / "attempts").iterdir()) == ["0001", "0002", "0003"]


def test_an_end_without_saving_is_written_down_once(run: Path, config: Config) -> None:
    with opened(run, config) as attempt:
        attempt.interrupted()
    assert (exit_of(run)["code"], exit_of(run)["class"]) == (130, "user")


@pytest.mark.parametrize("content", ["", "[1]", '{"name": "x"}', '{"attempts": 3}', "\0"])
def test_a_broken_record_is_one_clear_error(run: Path, config: Config, content: str) -> None:
    run.mkdir(parents=True)
    (run / "run.json").write_text(content)
    with pytest.raises(errors.PreflightError, match="RLKD-E161"), opened(run, config):
        pass


# -- one process at a time

HOLDER = """
import sys, time
from pathlib import Path
from rlkd.lease import held
with held(Path(sys.argv[1]), 60.0, print, lambda other: None):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.faults("F27")
def test_a_second_process_is_refused(run: Path, config: Config, other: "subprocess.Popen[str]") -> None:
    says = rf"pid {other.pid} on this machine.*last sign \d s ago"
    with pytest.raises(errors.PreflightError, match=says) as caught, opened(run, config):
        pass
    assert caught.value.exit_code == 3
    assert not (run / "run.json").exists()  # nothing of the first one's was touched
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.faults("F27", "F9")
def test_after_sigkill_there_is_nothing_to_delete_by_hand(
    run: Path, config: Config, other: "subprocess.Popen[str]"
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(run) is not None
    with opened(run, config):
        pass


@pytest.mark.faults("F27")
def test_a_stopped_process_still_holds(run: Path, config: Config, other: "subprocess.Popen[str]") -> None:
    other.send_signal(signal.SIGSTOP)
    old = time.time() - 10_000
    os.utime(run / lease.NAME, (old, old))
    with pytest.raises(errors.PreflightError, match="RLKD-E160"), opened(run, config):
        pass


def left_behind(run: Path, **changes: Any) -> Holder:
    """A lease that says somebody else holds the folder."""
    run.mkdir(parents=True, exist_ok=True)
    other = replace(Holder.me(), **changes)
    (run / lease.NAME).write_text(json.dumps(asdict(other)))
    return other


def test_a_number_that_was_given_again_is_another_process(run: Path, config: Config) -> None:
    """The container is started again, and its first process has the same number."""
    left_behind(run, started=Holder.me().started - 100)
    with opened(run, config):
        pass


ELSEWHERE = {"host": "node-7", "boot": "another boot/pid:[1]", "pid": 1}


@pytest.mark.faults("F27")
def test_a_process_elsewhere_that_gives_signs_of_life_is_not_disturbed(run: Path) -> None:
    left_behind(run, **ELSEWHERE)
    told: list[str] = []

    def beat(seconds: float) -> None:
        assert seconds <= 1.0
        os.utime(run / lease.NAME, (time.time() + 1, time.time() + 1))

    refused = pytest.raises(errors.PreflightError, match="pid 1 on node-7")
    with refused, held(run, 60.0, told.append, quiet, sleep=beat):
        pass
    assert told == ["process 1 on node-7 held this run 0 s ago: waiting up to 60 s to see whether it is alive"]


@pytest.mark.faults("F27", "F69")
def test_a_process_elsewhere_without_a_sign_is_dead_after_the_lease(run: Path) -> None:
    """The job was started again on another node: it waits for what is left of the lease, and no more."""
    other, waited = left_behind(run, **ELSEWHERE), 0

    def wait(seconds: float) -> None:
        nonlocal waited
        waited += 1
        time.sleep(seconds)

    old = time.time() - 58.5
    os.utime(run / lease.NAME, (old, old))
    with held(run, 59.0, quiet, quiet, sleep=wait) as me:
        assert holder(run) == me != other
    assert 1 <= waited <= 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_an_unreadable_lease_holds_nothing(run: Path, config: Config, content: str) -> None:
    run.mkdir(parents=True)
    (run / lease.NAME).write_text(content)
    with opened(run, config):
        pass


@pytest.mark.faults("F27")
def test_who_lost_the_folder_hears_of_it(run: Path) -> None:
    heard, told = threading.Event(), []

    def lost(other: Holder) -> None:
        told.append(other)
        heard.set()

    with held(run, 0.2, quiet, lost):
        other = left_behind(run, **ELSEWHERE)
        assert heard.wait(10)
    assert told == [other]
    assert holder(run) == other  # and leaves it alone


def test_a_deleted_lease_is_written_again(run: Path) -> None:
    with held(run, 0.2, quiet, lambda _: pytest.fail("nobody has it")) as me:
        (run / lease.NAME).unlink()
        end = time.monotonic() + 10
        while holder(run) != me:
            assert time.monotonic() < end
            time.sleep(0.02)


def race(run: Path, ready: Any, results: Any) -> None:
    """In a process of its own, which is slow between looking and writing: that is where others could come in."""
    write = lease._write

    def slow(directory: Path, me: Holder) -> None:
        time.sleep(0.5)
        write(directory, me)

    lease._write = slow
    ready.wait()
    try:
        with held(run, 60.0, quiet, quiet):
            results.put("held")
            time.sleep(2.0)
    except errors.PreflightError:
        results.put("refused")


@pytest.mark.faults("F27")
def test_of_several_that_find_a_dead_lease_one_takes_it(run: Path) -> None:
    left_behind(run, started=0.0)
    context = multiprocessing.get_context("fork")
    ready, results = context.Event(), context.Queue()
    racers = [context.Process(target=race, args=(run, ready, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    ready.set()
    assert sorted(results.get(timeout=30) for _ in racers) == ["held", "refused", "refused", "refused"]
    for racer in racers:
        racer.join(30)


# -- names and links


@pytest.mark.faults("F30")
@pytest.mark.parametrize("name", ["../x", "/x", "x/y", "..", ".", "", "a\0b", "-x", "x" * 101, "é", "a b"])
def test_names_that_are_no_folders_name(config: Config, name: str) -> None:
    with pytest.raises(errors.ConfigError):
        load("recipe.yaml", [f"name={json.dumps(name)}"])
    if "\0" not in name and name not in ("-x", "x" * 101, "é", "a b"):  # and what gets past that leads nowhere
        with pytest.raises(errors.PreflightError, match="leads out of"):
            attempts.run_directory(replace(config, name=name))


@pytest.mark.faults("F30")
def test_a_run_that_is_a_link_to_somewhere_else(config: Config, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Path(config.report.directory).mkdir()
    (Path(config.report.directory) / "demo").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.PreflightError, match="leads out of"):
        attempts.run_directory(config)


@pytest.mark.faults("F30")
@pytest.mark.parametrize("place", ["checkpoints", "attempts/0001/exit.json", "events.jsonl"])
def test_links_in_a_runs_folder_that_lead_out(run: Path, config: Config, tmp_path: Path, place: str) -> None:
    with opened(run, config):
        pass
    target = run / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(tmp_path / "secret.txt")
    with pytest.raises(errors.PreflightError, match="leads out of it") as caught, opened(run, config):
        pass
    assert str(target) in str(caught.value)
    target.unlink()
    target.symlink_to(run / "run.json")  # within: wandb makes such
    with opened(run, config):
        pass


def test_somebody_elses_folder_is_left_alone(run: Path, config: Config) -> None:
    run.mkdir(parents=True)
    (run / "thesis.tex").touch()
    with pytest.raises(errors.PreflightError, match="RLKD-E132"), opened(run, config):
        pass
    assert [p.name for p in run.iterdir()] == ["thesis.tex"]


# -- from where it goes on


def test_resume_never_is_for_a_new_folder(run: Path) -> None:
    assert attempts.starting_point(run, "never", 1) is None
    with pytest.raises(errors.PreflightError, match="RLKD-E162"):
        attempts.starting_point(run, "never", 2)
    committed(run, 10)  # a fork that has not begun: its checkpoint would be gone on with
    with pytest.raises(errors.PreflightError, match="RLKD-E162"):
        attempts.starting_point(run, "never", 1)


def test_resume_from_a_step(run: Path) -> None:
    committed(run, 10, 20, 30)
    assert attempts.starting_point(run, "auto", 2) is None
    assert attempts.starting_point(run, "20", 2) == 20
    with pytest.raises(errors.CheckpointError, match="no checkpoint of step 25") as caught:
        attempts.starting_point(run, "25", 2)
    assert "10, 20, 30" in str(caught.value)
    assert caught.value.exit_code == 7


def test_later_checkpoints_are_kept_under_another_name(run: Path) -> None:
    committed(run, 10, 20, 30)
    assert attempts.set_aside(run, 10, 4) == [20, 30]
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == [".old-step-000020-attempt-0004", ".old-step-000030-attempt-0004", "step-000010"]
    assert attempts.set_aside(run, 10, 5) == []


# -- whose checkpoints they are

WAS: dict[str, Any] = {
    "model": "a1", "tokenizer": "b1", "algorithm": "grpo", "curriculum": "uniform", "seed": 0, "data": "c1",
    "settings": {"learner.lr": 1e-4, "learner.ranks": 1, "sampler.workers": 2, "name": "demo", "schedule.steps": 8,
                 "deterministic": False, "rewards.exact.weight": 1.0},
    "packages": {"torch": "2.13.0", "ray": "2.60.0", "vllm": "0.32.0"},
}  # fmt: skip


def now(**changes: Any) -> dict[str, Any]:
    return {**WAS, **changes}


def test_the_same_run() -> None:
    assert fingerprint.compare(WAS, now()) == Comparison()
    fingerprint.refuse(Comparison(), Path(), accept_new_data=False)
    assert fingerprint.compare({}, now()).refused == ()  # an older rlkd wrote none: nothing is known to differ


@pytest.mark.faults("F26")
@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("model", "model (config.json)", "a2"),
        ("tokenizer", "tokenizer", "b2"),
        ("algorithm", "algorithm.name", "dapo"),
        ("curriculum", "curriculum.name", "difficulty"),
        ("seed", "seed", 7),
    ],
)
def test_another_run_is_refused_with_a_table(tmp_path: Path, key: str, name: str, value: Any) -> None:
    found = fingerprint.compare(WAS, now(**{key: value}, data="c2"))
    assert found.refused == (Change(name, str(WAS[key]), str(value)),)
    with pytest.raises(errors.CheckpointError, match="RLKD-K120") as caught:
        fingerprint.refuse(found, tmp_path, accept_new_data=True)  # that does not help here
    assert caught.value.exit_code == 7
    lines = str(caught.value).splitlines()
    assert lines[1].split() == [*name.split(), str(WAS[key]), "→", str(value)]
    assert lines[2].split() == ["data.train", "c1", "→", "c2"]
    assert "model.path" not in str(caught.value)  # there is no checkpoint here
    committed(tmp_path, 10, 20)
    with pytest.raises(errors.CheckpointError) as caught:
        fingerprint.refuse(found, tmp_path, accept_new_data=True)
    assert str(caught.value).splitlines()[-1].endswith(f"name=… model.path={tmp_path}/checkpoints/step-000020/hf")


@pytest.mark.faults("F49")
def test_other_data_is_refused_unless_accepted(tmp_path: Path) -> None:
    found = fingerprint.compare(WAS, now(data="c2"))
    assert found.new_data
    with pytest.raises(errors.CheckpointError, match="--accept-new-data"):
        fingerprint.refuse(found, tmp_path, accept_new_data=False)
    fingerprint.refuse(found, tmp_path, accept_new_data=True)


def told(**changes: Any) -> list[str]:
    packages = {"packages": {**WAS["packages"], **changes.pop("packages", {})}}
    return list(fingerprint.compare(WAS, now(settings={**WAS["settings"], **changes}, **packages)).told)


def test_changed_settings_are_told() -> None:
    changes: dict[str, Any] = {"learner.lr": 5e-5, "schedule.steps": 16, "name": "other", "checkpoint.every": 4}
    assert told(**changes) == [
        "changed: learner.lr 0.0001 → 5e-05",
        "changed: schedule.steps 8 → 16",
        "changed: checkpoint.every not set → 4",
    ]
    without = {k: v for k, v in WAS["settings"].items() if not k.startswith("rewards")}
    found = fingerprint.compare(WAS, now(settings={**without, "rewards.math.weight": 1.0}))
    assert found.told == (
        "changed: rewards.math.weight not set → 1.0",
        "changed: rewards.exact.weight 1.0 → not set",
    )


@pytest.mark.faults("F26", "F70")
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sampler.workers": 3}, "this resume is L2 (the same prompts and seeds): sampler.workers 2 → 3"),
        ({"packages": {"torch": "2.13.1"}}, "torch 2.13.0 → 2.13.1"),
        (
            {"packages": {"vllm": "0.33.0"}},
            "warning: vllm 0.32.0 → 0.33.0: the same numbers (L3, L4) cannot be expected, the same prompts (L2) can",
        ),
        (
            {"packages": {"ray": "nightly"}},
            "warning: ray 2.60.0 → nightly: the same numbers (L3, L4) cannot be expected, the same prompts (L2) can",
        ),
        ({"packages": {"new": "1.0"}}, None),
    ],
)
def test_what_exactness_a_resume_has(changes: dict[str, Any], line: str | None) -> None:
    assert told(**changes) == ([line] if line else [])


def test_a_deterministic_run_is_told_what_it_loses() -> None:
    lines = told(**{"sampler.workers": 3, "learner.ranks": 2, "deterministic": True})
    assert lines == [
        "changed: deterministic False → True",
        "this resume is L2 (the same prompts and seeds), not L4 (the same numbers), because learner.ranks 1 → 2, "
        "sampler.workers 2 → 3",
    ]
