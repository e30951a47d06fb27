"""What runs on the cluster's side: the driver's entry and its last line, and the small job that looks around."""

import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlkd.submit import entry, probe
from rlkd.submit.ending import MARK, Ending, ending, line
from rlkd.submit.jobs import Job


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, train: Callable[[], Any]) -> int:
    """`entry.main` with another `rlkd train`."""
    import rlkd.cli

    monkeypatch.setattr(rlkd.cli, "app", lambda *_, **__: train())
    return entry.main([str(folder), "recipe.yaml", "a=b"])


def attempt(folder: Path, number: int, **record: Any) -> None:
    path = folder / f"attempts/{number:04d}/exit.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))


def said(text: str) -> Any:
    (last,) = [row[len(MARK) :] for row in text.splitlines() if row.startswith(MARK)]
    return json.loads(last)


def exits(code: Any) -> Callable[[], Any]:
    def train() -> None:
        raise SystemExit(code)

    return train


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 75), (None, 0), (5, 5), ("a text", 1)])
def test_the_last_line_says_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: Any, expected: int
) -> None:
    assert run(monkeypatch, tmp_path, exits(code)) == expected
    assert said(capsys.readouterr().out)["exit"] == expected


def test_the_record_is_that_of_this_attempt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(tmp_path, 1, code=75, saved=3)
    run(monkeypatch, tmp_path, exits(3))
    assert said(capsys.readouterr().out)["record"] is None

    def train() -> None:
        attempt(tmp_path / "2-rl", 1, code=75, saved=8)
        event = {"kind": "checkpoint", "step": 8, "seconds": 4.5}
        (tmp_path / "2-rl/events.jsonl").write_text(json.dumps(event) + "\n")
        raise SystemExit(75)

    run(monkeypatch, tmp_path, train)
    found = said(capsys.readouterr().out)
    assert found["record"]["saved"] == 8
    assert found["save_s"] == 4.5


def test_sigterm_before_the_run_began_is_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 75
    assert said(capsys.readouterr().out)["exit"] == 75


def test_a_bug_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, tmp_path, train)
    assert said(capsys.readouterr().out)["exit"] == 1


@pytest.mark.parametrize(
    ("job", "log", "expected"),
    [
        (Job("a-1", "SUCCEEDED"), "", Ending(0)),
        (Job("a-1", "FAILED", 5), "", Ending(5)),
        (Job("a-1", "FAILED", -9), "", Ending(None)),
        (Job("a-1", "FAILED"), "the supervisor died", Ending(None)),
        (Job("a-1", "STOPPED"), "", Ending(None)),
        (Job("a-1", "STOPPED"), "SIGTERM: saved (exit 75)", Ending(75)),
        (Job("a-1", "STOPPED"), "Attempt 1 ended after step 3 (preempt, exit 75); the", Ending(75)),
        (Job("a-1", "STOPPED"), "(exit 75)\n" + "later\n" * 40, Ending(None)),
        (Job("a-1", "STOPPED"), line(75, None, None, None), Ending(75)),
        (Job("a-1", "STOPPED"), line(75, {"saved": 3}, 1.5, 0.5)[:-9], Ending(None)),
        (Job("a-1", "FAILED", 75), line(75, {"saved": 3}, 1.5, 0.5), Ending(75, {"saved": 3}, 1.5, 0.5)),
    ],
)
def test_how_a_job_ended(job: Job, log: str, expected: Ending) -> None:
    assert ending(job, log) == expected


def test_only_75_is_submitted_again() -> None:
    assert [code for code in (None, *range(256)) if Ending(code).again] == [75]


# --- the small job


def asked(folder: Path, **paths: str) -> dict[str, Any]:
    return {"folder": str(folder), "paths": paths, "packages": ["numpy", "no-such-package"], "model": None, "node_s": 5}


def test_a_node_says_its_versions_and_what_it_lacks(tmp_path: Path) -> None:
    token, wrong = probe.token_in(str(tmp_path / "runs"))
    assert wrong is None
    found = probe.look(asked(tmp_path, here=str(tmp_path), there="/no/such/path", home="~"), token)
    assert found["missing"] == ["there"]
    assert found["token"] is True
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["no-such-package"] is None


def test_a_node_with_another_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SEE_S", 0.1)
    assert probe.look(asked(tmp_path), str(tmp_path / "not-here"))["token"] is False


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    token, wrong = probe.token_in(str(tmp_path / "file/runs"))
    assert token is None
    assert "file" in str(wrong)


def test_the_models_config_is_sent_along(tmp_path: Path) -> None:
    assert probe.config_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert probe.config_of(str(tmp_path)) == {"hidden_size": 8}


def test_it_needs_nothing_of_rlkd_and_runs_on_an_old_python() -> None:
    source = Path(str(probe.__file__)).read_text()
    assert "import rlkd" not in source
    assert "from rlkd" not in source
    assert source.index("from __future__ import annotations") < source.index("def ")


def test_what_is_free_is_unknown_where_ray_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.state

    monkeypatch.delattr(ray._private.state, "available_resources_per_node")
    (found,) = probe.resources([{"NodeID": "n", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}}])
    assert found["free"] is None
    assert found["all"] == {"CPU": 2.0, "GPU": 0.0}
    assert found["head"] is False
