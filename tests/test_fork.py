"""`rlkd fork`: a new run that begins with a checkpoint of another, which is left as it was."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlkd import attempt, cli, fork
from rlkd.core.errors import NO_CHECKPOINT, PREFLIGHT, USAGE, CheckpointError
from rlkd.lease import held, holder
from rlkd.report.files import replace_file
from rlkd.store.store import Store
from tests.store_help import flip, is_of, saved
from tests.test_cli import RECIPE

FINGERPRINT = {"seed": 3, "algorithm": "grpo"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 and 20."""
    run = tmp_path / "runs/old"
    store = Store(run / "checkpoints")
    for step in (10, 20):
        saved(store, step, fingerprint=FINGERPRINT, attempt=1)
    record = {"name": "old", "attempts": [{"attempt": 1}, {"attempt": 2}], "fingerprint": FINGERPRINT}
    replace_file(run / "run.json", json.dumps(record))
    (run / "config.yaml").write_text("checkpoint: {keep: 3, remote: null}\n")
    (run / "metrics.jsonl").write_text("{}\n")
    return run


def everything(run: Path) -> Mapping[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def rlkd_fork(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["fork", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(("asked", "step"), [((), 20), (("--step", 10), 10)])
def test_a_fork_begins_with_the_checkpoint_and_its_lineage(old: Path, asked: tuple[object, ...], step: int) -> None:
    before = everything(old)
    code, out, err = rlkd_fork(old, "new", *asked)
    assert (code, err) == (0, "")
    new = old.parent / "new"
    assert f"new begins at step {step} of old" in out
    assert f"rlkd resume {new}" in out
    store = Store(new / "checkpoints")
    assert store.there() == [step]
    assert is_of(store.at(step).path, step)
    digest = Store(old / "checkpoints").at(step).manifest.digest
    record = attempt.read_record(new)
    assert record["name"] == "new"
    assert record["attempts"] == []
    assert record["fingerprint"] == FINGERPRINT
    (line,) = record["lineage"]
    assert (line["from"], line["step"], line["digest"]) == (str(old), step, digest)
    facts = store.at(step).manifest.facts
    assert facts["run"] == "new"
    assert (facts["lineage"]["from"], facts["lineage"]["digest"]) == (str(old), digest)
    assert (new / "config.yaml").read_text() == (old / "config.yaml").read_text()
    assert not (new / "metrics.jsonl").exists()
    assert holder(new) is None
    assert everything(old) == before


def test_what_the_fork_does_is_not_the_other_s(old: Path) -> None:
    """Its checkpoints are names for the same files; neither run changes a file, so deleting here is nothing there."""
    fork.fork(old, "new", None, print)
    store = Store(old.parent / "new/checkpoints")
    saved(store, 30)
    assert store.drop(20)
    assert Store(old / "checkpoints").verify(20) == []
    assert Store(old / "checkpoints").there() == [10, 20]


def test_the_result_as_json(old: Path) -> None:
    code, out, _ = rlkd_fork(old, "new", "--json")
    assert code == 0
    told = json.loads(out)
    assert {k: told[k] for k in ("run", "from", "step")} == {
        "run": str(old.parent / "new"), "from": str(old), "step": 20,
    }  # fmt: skip


def test_no_such_run(old: Path) -> None:
    code, _, err = rlkd_fork(old.parent / "odl", "new")
    assert code == PREFLIGHT
    assert "RLKD-E131" in err
    assert f"did you mean {old}?" in err
    code, _, err = rlkd_fork(old.parent / "something-else", "new")
    assert code == PREFLIGHT
    assert f"runs in {old.parent}: old" in err
    assert [p.name for p in old.parent.iterdir()] == ["old"]


def test_no_such_step(old: Path) -> None:
    code, _, err = rlkd_fork(old, "new", "--step", 15)
    assert code == NO_CHECKPOINT
    assert "no checkpoint of step 15" in err
    assert "complete checkpoints: 10, 20" in err
    assert not (old.parent / "new").exists()


def test_a_name_that_is_taken(old: Path) -> None:
    (old.parent / "file").touch()
    (old.parent / "empty").mkdir()
    (old.parent / "link").symlink_to("empty")
    for name in ("old", "file", "link"):
        code, _, err = rlkd_fork(old, name)
        assert code == PREFLIGHT, name
        assert "RLKD-E165" in err
    assert rlkd_fork(old, "empty")[0] == 0


@pytest.mark.faults("F30")
@pytest.mark.parametrize("name", ["../out", "/out", ".hidden", "a b", "", "x" * 101])
def test_a_name_that_no_run_can_have(old: Path, name: str) -> None:
    code, _, err = rlkd_fork(old, name)
    assert code == USAGE
    assert "RLKD-C417" in err


@pytest.mark.faults("F24")
def test_a_damaged_checkpoint_makes_no_run(old: Path) -> None:
    flip(old / "checkpoints/step-000020/driver.json")
    code, _, err = rlkd_fork(old, "new")
    assert code == NO_CHECKPOINT
    assert "the checkpoint of step 20 is damaged" in err
    assert not (old.parent / "new").exists()
    assert rlkd_fork(old, "new", "--step", 10)[0] == 0


@pytest.mark.faults("F27")
def test_a_folder_that_somebody_holds_is_left_alone(old: Path) -> None:
    """Another fork of the same name, at the same moment."""
    new = old.parent / "new"
    with held(new, 60.0, print, lambda _: None):
        code, _, err = rlkd_fork(old, "new")
        assert code == PREFLIGHT
        assert "RLKD-E160" in err
        assert new.is_dir()


def test_a_run_with_stages_is_forked_by_the_stage(old: Path) -> None:
    old.rename(old.parent / "1-sft")
    (old.parent / "stages.json").write_text('{"stages": ["1-sft"]}')
    code, _, err = rlkd_fork(old.parent, "new")
    assert code == PREFLIGHT
    assert f"{old.parent / '1-sft'}" in err
    assert rlkd_fork(old.parent / "1-sft", "new")[0] == 0


def test_checkpoints_of_that_name_in_the_remote_store(old: Path, tmp_path: Path) -> None:
    """They would be gone on with instead."""
    remote = tmp_path / "remote"
    (old / "config.yaml").write_text(RECIPE + f"checkpoint: {{remote: 'file://{remote}'}}\n")
    saved(Store(remote / "new"), 99)
    code, _, err = rlkd_fork(old, "new")
    assert code == PREFLIGHT
    assert "newest: step 99" in err
    assert not (old.parent / "new").exists()
    assert rlkd_fork(old, "other")[0] == 0


def test_a_copy_of_a_copy_names_its_parent(old: Path) -> None:
    fork.fork(old, "new", 10, print)
    fork.fork(old.parent / "new", "newer", None, print)
    (line,) = attempt.read_record(old.parent / "newer")["lineage"]
    assert (line["from"], line["step"]) == (str(old.parent / "new"), 10)
    with pytest.raises(CheckpointError, match="complete checkpoints: 10"):
        fork.fork(old.parent / "newer", "newest", 20, print)
