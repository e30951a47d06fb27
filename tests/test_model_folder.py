"""A model's folder is looked at before anything is started: what is missing or damaged is one clear error (exit 3)."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlkd.core.errors import PREFLIGHT, PreflightError
from rlkd.model_folder import model_config, own_context

CONFIG = '{"model_type": "llama", "max_position_embeddings": 64, "vocab_size": 300}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two files of weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(CONFIG)
    for n in (1, 2):
        save_file({"w": np.zeros((50, 10), np.float32)}, path / f"model-0000{n}-of-00002.safetensors")
    return path


def test_a_whole_folder(folder: Path) -> None:
    assert own_context(model_config(str(folder))) == 64


@pytest.mark.faults("F52")
def test_a_folder_that_is_not_there_names_near_ones(folder: Path) -> None:
    with pytest.raises(PreflightError, match="no such model folder") as caught:
        model_config(str(folder.parent / "modle"))
    assert f"did you mean `{folder}`" in str(caught.value)
    assert caught.value.exit_code == PREFLIGHT
    with pytest.raises(PreflightError, match="`rlkd model get tiny "):
        model_config(str(folder.parent / "tiny"))


@pytest.mark.faults("F52")
@pytest.mark.parametrize("config", [None, "{", "[]", "{}"])
def test_a_folder_without_a_model(folder: Path, config: str | None) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(PreflightError, match="RLKD-E118"):
        model_config(str(folder))


@pytest.mark.faults("F52")
def test_a_folder_without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(PreflightError, match="RLKD-E119"):
        model_config(str(folder))


@pytest.mark.faults("F52")
@pytest.mark.parametrize("damage", ["one byte short", "half", "in the header", "empty", "pointer", "nowhere"])
def test_weights_that_are_not_whole_are_named(folder: Path, damage: str) -> None:
    """The second file of two, so that looking at the first alone is not enough."""
    file = folder / "model-00002-of-00002.safetensors"
    size = file.stat().st_size
    if damage == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2048\n")
    elif damage == "nowhere":
        file.unlink()
        file.symlink_to(folder / "blob")
    else:
        os.truncate(file, {"one byte short": size - 1, "half": size // 2, "in the header": 20, "empty": 0}[damage])
    with pytest.raises(PreflightError, match="RLKD-E121") as caught:
        model_config(str(folder))
    (problem,) = caught.value.problems
    assert problem.where == str(file)
    assert "get it again" in (problem.fix or "")
    assert caught.value.exit_code == PREFLIGHT
