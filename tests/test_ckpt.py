"""`rlkd ckpt`: a run's checkpoints listed, verified, pinned and deleted; and the settings of the section checkpoint."""

import json
from pathlib import Path

import pytest

from rlkd import ckpt
from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.core.errors import CheckpointError, ConfigError
from rlkd.store.retention import Keep
from rlkd.store.store import Store
from tests.store_help import flip, saved
from tests.test_config import RECIPE

SETTINGS = "checkpoint:\n  every: 1\n  keep: 2\n  keep_every: 4\n  keep_best: 1\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 to 6, all of them kept so far."""
    (tmp_path / "config.yaml").write_text(SETTINGS)
    store = Store(tmp_path / "checkpoints", Keep(last=9))
    for step, score in enumerate([0.5, 0.9, 0.1, None, 0.2, 0.25], 1):
        saved(store, step, score=score)
    return tmp_path


def test_ls_says_what_there_is_and_why_it_is_kept(run: Path) -> None:
    ckpt.pin(run, 3)
    (run / "checkpoints" / "step-000001" / "MANIFEST.json").write_text("{}")
    (run / "checkpoints" / ".bad" / "step-000009").mkdir(parents=True)
    result = ckpt.ls(run)
    kept = {row["step"]: row["kept"] for row in result["checkpoints"]}
    assert kept == {2: ["best 1"], 3: ["pinned"], 4: ["every 4"], 5: ["newest"], 6: ["newest"]}
    assert result["unreadable"] == [1]
    assert result["bad"] == ["step-000009"]
    json.dumps(result)
    lines = result["text"].splitlines()
    assert lines[0].split() == ["step", "size", "files", "saved", "score", "kept", "as"]
    assert lines[1].split()[:4] == ["2", "11.3", "kB", "3"]
    assert lines[3].split()[-3:] == ["—", "every", "4"]
    assert lines[-2:] == ["step 1 has no readable manifest", "damaged, moved away: .bad/step-000009"]


@pytest.mark.faults("F24")
def test_verify_reads_every_byte_and_moves_nothing(run: Path) -> None:
    assert ckpt.verify(run)["whole"]
    assert "exit" not in ckpt.verify(run)
    flip(run / "checkpoints" / "step-000002" / "learner" / "rank-0.pt")
    result = ckpt.verify(run)
    assert result["exit"] == 7
    assert [row["step"] for row in result["checkpoints"] if not row["whole"]] == [2]
    assert "step 2: learner/rank-0.pt: its content was changed" in result["text"]
    assert ckpt.verify(run, 1)["whole"]
    assert ckpt.verify(run, 2)["exit"] == 7
    assert Store(run / "checkpoints").there() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7[\s\S]*1, 2, 3, 4, 5, 6"):
        ckpt.verify(run, 7)


@pytest.mark.faults("F29")
def test_prune_keeps_what_the_run_would_keep_unless_told_otherwise(run: Path) -> None:
    ckpt.pin(run, 1)
    dry = ckpt.prune(run, dry=True)
    assert (dry["deleted"], dry["kept"]) == ([3], [1, 2, 4, 5, 6])
    assert dry["text"] == "would be deleted: 3\nkept: 1, 2, 4, 5, 6"
    assert Store(run / "checkpoints").there() == [1, 2, 3, 4, 5, 6]
    assert ckpt.prune(run)["deleted"] == [3]
    assert ckpt.prune(run, last=0, every=0, best=0)["kept"] == [1, 5, 6]
    assert ckpt.unpin(run, 1)["was"]
    assert ckpt.unpin(run, 1)["text"] == "step 1 was not pinned"
    assert ckpt.prune(run, every=0, best=0)["text"] == "deleted: 1\nkept: 5, 6"


@pytest.mark.faults("F24", "F29")
@pytest.mark.parametrize("dry", [True, False])
def test_prune_says_what_is_damaged(run: Path, dry: bool) -> None:
    flip(run / "checkpoints" / "step-000006" / "driver.json")
    result = ckpt.prune(run, dry=dry)
    assert result["deleted"] == [1, 3]
    assert "step-000006 is damaged: driver.json: its content was changed" in result["text"]
    assert (run / "checkpoints" / "step-000006").exists() == dry


@pytest.mark.faults("F29")
@pytest.mark.parametrize("settings", ["checkpoint: {keep: many}", "checkpoint: 3", "[1", "- 1"])
def test_nothing_is_deleted_when_nobody_knows_what_to_keep(run: Path, settings: str) -> None:
    (run / "config.yaml").write_text(settings)
    with pytest.raises(CheckpointError, match="RLKD-K018"):
        ckpt.prune(run)
    assert Store(run / "checkpoints").there() == [1, 2, 3, 4, 5, 6]


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    for command in (ckpt.ls, ckpt.verify, ckpt.prune):
        with pytest.raises(CheckpointError, match=r"RLKD-K017[\s\S]*give the folder of a run") as caught:
            command(tmp_path)
        assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint.keep=1"], "checkpoint.keep=1: must be at least 2"),
        (["checkpoint.keep_best=-1"], "at least 0"),
        (["checkpoint.upload_wait_s=-1"], "at least 0"),
        (["checkpoint.max_failed_saves=0"], "at least 1"),
        (["checkpoint.every=4", "checkpoint.keep_every=10"], "checkpoint.keep_every=12"),
        (["checkpoint.keep_every=10"], "it is saved by time, at no particular steps"),
        (["checkpoint.keep_every=10", "checkpoint.every=0"], "only the last step is saved"),
        (["checkpoint.keep_best=1", "checkpoint.every=0", "evaluate.every=5"], "saves only the last step"),
        (["checkpoint.every=2", "checkpoint.keep_best=1"], "evaluate.every=0"),
        (["checkpoint.remote="], "no plain URL"),
        (["checkpoint.remote=s3://key:secret@bucket/x"], "keys come from the environment"),
        (["checkpoint.remote=s3://bucket/*"], "no plain URL"),
        (["checkpoint.remote=s3://"], "no plain URL"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, overrides: list[str], said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "recipe.yaml", overrides)
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


def test_settings_that_do(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    checkpoint = "checkpoint={every: 5, keep: 3, keep_every: 10, keep_best: 1, remote: s3://bucket/runs}"
    config = load(tmp_path / "recipe.yaml", ["evaluate.every=5", checkpoint])
    assert isinstance(config, Config)
    assert config.checkpoint.remote == "s3://bucket/runs"
