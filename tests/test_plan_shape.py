"""Parameters by part from config.json alone, against transformers and against what is published."""

import json
from pathlib import Path

import pytest

from rlkd.core.errors import PreflightError
from rlkd.plan.known import KNOWN
from rlkd.plan.shape import config_of, published, read, shape_of

STUDENT = Path(__file__).parent.parent / "rlkd" / "models" / "tiny_student"
PUBLISHED = {  # parameters, as the model cards' safetensors say
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_known_models_have_as_many_parameters_as_published(name: str) -> None:
    shape = read(KNOWN[name], name, "here")
    assert shape.parameters == PUBLISHED[name]
    assert sum(shape.parts.values()) == shape.parameters


def test_the_student_that_ships() -> None:
    from safetensors import safe_open

    with safe_open(STUDENT / "model.safetensors", framework="numpy") as file:
        stored = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert shape_of(str(STUDENT)).parameters == stored


def test_keys_and_values_of_a_token() -> None:
    assert read(KNOWN["Qwen2.5-7B"], "x", "here").kv_bytes(2) == 57_344  # performance.md §2.4: 57 KB


def test_a_folder_name_finds_the_published_model_whose_name_it_holds() -> None:
    for name, expected in (
        ("Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("qwen2.5-math-7b-16k", "Qwen2.5-Math-7B-16k"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", "R1-Distill-Qwen-1.5B"),
    ):
        assert published(name) == dict(KNOWN[expected])
    assert published("my-own") is None


def test_the_folder_comes_before_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    content = {**KNOWN["Qwen2.5-7B"], "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(content))
    assert shape_of(str(folder)).layers == 2


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, "E180", "no .*config.json"),
        ("{", "E180", "cannot read"),
        ("[]", "E180", "no mapping"),
        (json.dumps({**SMALL, "model_type": "mamba"}), "E181", "kind `mamba`"),
        (json.dumps({**SMALL, "model_type": "qwen3", "num_experts": 8}), "E181", "num_experts=8"),
        (json.dumps({"model_type": "llama", "hidden_size": 8}), "E180", "lacks a size: 'num_attention_heads'"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(tmp_path: Path, content: str | None, code: str, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PreflightError, match=says) as error:
        shape_of(str(tmp_path))
    assert error.value.problems[0].code == f"RLKD-{code}"
    assert error.value.exit_code == 3


def test_the_config_of_a_folder_is_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert config_of(str(tmp_path)) == {"model_type": "llama"}
