"""The tokenizer's port over transformers: what is added, what ends an answer, and folders that are no model."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core.errors import PREFLIGHT, PreflightError
from rlkd.core.ports import Tokenizer
from rlkd.data.chat import HFTokenizer, TemplateRefusal
from rlkd.models.tiny import character_tokenizer
from tests.small_tokenizers import BOS, EOS, byte_tokenizer, folder, wrapped

USER = [{"role": "user", "content": "1+2?"}]


def test_is_the_ports_tokenizer() -> None:
    assert isinstance(wrapped(), Tokenizer)


def test_chat_ends_where_the_answer_begins_and_starts_with_one_bos() -> None:
    tokenizer = wrapped()
    tokens = tokenizer.chat(USER)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens, special=True) == f"{BOS}user:1+2?<turn>assistant:"


def test_plain_text_gets_the_tokenizers_own_bos() -> None:
    tokenizer = wrapped()
    assert tokenizer.decode(tokenizer.encode("ab"), special=True) == f"{BOS}ab"
    assert tokenizer.encode_many(["ab"], special=False)[0].tolist() == tokenizer.encode("ab").tolist()[1:]


def test_encode_many_is_encode_of_each() -> None:
    tokenizer = wrapped()
    texts = ["a", "", "longer text, ü", "b" * 5000]
    many = tokenizer.encode_many(texts)
    assert [t.tolist() for t in many] == [tokenizer.encode(t).tolist() for t in texts]
    assert [len(t) for t in many] == [1 + len(t.encode()) for t in texts]
    assert tokenizer.encode_many([]) == []


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_decode_gives_back_what_was_encoded(text: str) -> None:
    tokenizer = _SHARED
    assert tokenizer.decode(tokenizer.encode_many([text], special=False)[0]) == text


_SHARED = wrapped()


def test_decode_leaves_spaces_before_punctuation_alone() -> None:
    words = character_tokenizer()  # no BPE, for which transformers ignores the setting
    words.clean_up_tokenization_spaces = True  # as many older folders say: "1 ." would become "1."
    tokenizer = HFTokenizer(words)
    assert tokenizer.decode(tokenizer.encode("1 . 2")) == "1 . 2"


@pytest.mark.faults("F45")
def test_a_prompt_longer_than_the_tokenizer_likes_is_not_cut() -> None:
    short = byte_tokenizer()
    short.model_max_length = 4
    assert len(HFTokenizer(short).encode("123456789")) == 10


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    tokenizer = wrapped()
    tokens = np.array([*tokenizer.encode("hi"), tokenizer.eos], np.int32)
    assert tokenizer.decode(tokens) == "hi"
    assert tokenizer.decode(tokens, special=True) == f"{BOS}hi{EOS}"


def test_a_truncation_saved_with_the_tokenizer_does_not_cut(tmp_path: Path) -> None:
    file = folder(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    assert len(HFTokenizer.load(str(tmp_path)).encode("123456789")) == 10


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [3, 7]}}, (2, 3, 7)),
        ({"generation_config.json": {"eos_token_id": 3}}, (2, 3)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 9, "model_type": "llama"}}, (2,)),
        ({"config.json": {"eos_token_id": 9, "model_type": "llama"}}, (2, 9)),
        ({}, (2,)),
    ],
)
def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(
    tmp_path: Path, content: dict[str, dict[str, object]], expected: tuple[int, ...]
) -> None:
    folder(tmp_path)
    for name, value in content.items():
        (tmp_path / name).write_text(json.dumps(value))
    tokenizer = HFTokenizer.load(str(tmp_path))
    assert tokenizer.stop_tokens == expected
    assert (tokenizer.eos, tokenizer.pad) == (2, 0)


@pytest.mark.parametrize("bad", ['{"eos_token_id": "</s>"}', "[", "[1]", '{"eos_token_id": [true]}'])
def test_end_tokens_that_are_no_numbers(tmp_path: Path, bad: str) -> None:
    folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(bad)
    with pytest.raises(PreflightError, match="end tokens") as caught:
        HFTokenizer.load(str(tmp_path))
    assert "generation_config.json" in str(caught.value)


def test_no_end_token_anywhere() -> None:
    with pytest.raises(PreflightError, match="answers would never end"):
        HFTokenizer(byte_tokenizer(eos=None))
    assert HFTokenizer(byte_tokenizer(eos=None), [5, 3]).eos == 5


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    for name in ("smollm2-135m", "smollm2-360m", "gemma3-270m"):
        (tmp_path / name).mkdir()
    with pytest.raises(PreflightError, match="did you mean") as caught:
        HFTokenizer.load(str(tmp_path / "smolm2-135"))
    assert "smollm2-135m" in str(caught.value)
    assert caught.value.exit_code == PREFLIGHT


@pytest.mark.faults("F52")
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": '{"model_type": "llama"}'},
        {"config.json": '{"model_type": "gpt2"}'},  # transformers makes a tokenizer of one token from this
        {"config.json": '{"model_type": "qwen2"}'},
        {"config.json": "{", "tokenizer.json": "{}"},
        {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}"},
        {"config.json": '{"model_type": "llama"}', "tokenizer.json": '{"version": '},
    ],
)
def test_folders_without_a_tokenizer(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(PreflightError, match="its tokenizer") as caught:
        HFTokenizer.load(str(tmp_path))
    assert "\n" not in caught.value.problems[0].what


@pytest.mark.faults("F52")
def test_no_chat_template() -> None:
    with pytest.raises(PreflightError, match="has no chat template") as caught:
        wrapped(template=None).chat(USER)
    assert "data.chat=false" in str(caught.value)


def test_a_template_file_replaces_the_folders_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[0].content }} A:")
    tokenizer = HFTokenizer.load(str(folder(tmp_path / "model")), chat_template=str(file))
    assert tokenizer.decode(tokenizer.chat(USER), special=True) == "Q: 1+2? A:"


def test_a_missing_template_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("x")
    with pytest.raises(PreflightError, match="did you mean") as caught:
        HFTokenizer.load(str(folder(tmp_path / "model")), chat_template=str(tmp_path / "mime.jinja"))
    assert "mine.jinja" in str(caught.value)


def test_a_broken_template() -> None:
    with pytest.raises(PreflightError, match="broken: line 1"):
        wrapped(template="{% if %}").chat(USER)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[5].content + 1 }}", "{{ 1 // 0 }}", "{{ 1 + 'a' }}"],
)
def test_a_template_that_refuses(template: str) -> None:
    with pytest.raises(TemplateRefusal):
        wrapped(template=template).chat(USER)


def test_survives_pickling() -> None:
    tokenizer = wrapped()
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.chat(USER).tolist() == tokenizer.chat(USER).tolist()
