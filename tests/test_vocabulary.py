"""Which teachers mean the same by a token id, and what a run knows of them before anything is started."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers

from rlkd.algorithms.grpo import GRPO
from rlkd.config.schema import Config, DataConfig, ModelConfig, ScorerConfig, TeacherConfig, WriterConfig
from rlkd.core.errors import ConfigError, PreflightError
from rlkd.core.types import Prompt, Signal
from rlkd.data import HFTokenizer
from rlkd.data.vocabulary import differing, ids_of, mismatch, retold
from rlkd.models.tiny import character_tokenizer
from rlkd.teachers import known, reader, unused
from rlkd.train.loop import Schedule
from tests.small_tokenizers import byte_tokenizer, wrapped
from tests.toys import prompt_of

WORDS = {"a": 0, "b": 1, "c": 2, "d": 3}


def test_the_same_map_is_the_same_whatever_its_order() -> None:
    assert differing(WORDS, dict(reversed(WORDS.items()))) == []


@pytest.mark.faults("F50")
def test_a_padded_prefix_is_the_same_on_either_side() -> None:
    longer = {**WORDS, "<extra_0>": 4, "<extra_1>": 9}
    assert differing(WORDS, longer) == differing(longer, WORDS) == []


@pytest.mark.faults("F50")
def test_the_same_size_may_be_other_words() -> None:
    """Negative control for comparing sizes, which would find nothing here."""
    other = {"a": 0, "c": 1, "b": 2, "d": 3}
    assert len(other) == len(WORDS)
    assert differing(WORDS, other) == [(1, "b", "c"), (2, "c", "b")]


def test_a_hole_is_a_difference_and_no_vocabulary_matches_nothing() -> None:
    assert differing(WORDS, {"a": 0, "b": 1, "d": 3}) == [(2, "c", None)]
    assert differing({}, {"a": 0}) == [(0, None, "a")]


@given(st.permutations(range(12)), st.integers(1, 12))
def test_differing_is_symmetric_and_empty_only_for_prefixes(order: list[int], size: int) -> None:
    one = {f"w{i}": i for i in range(12)}
    other = {f"w{word}": i for i, word in enumerate(order[:size])}
    found = differing(one, other)
    assert found == [(i, mine, theirs) for i, theirs, mine in differing(other, one)]
    assert (found == []) == (order[:size] == list(range(size)))


@pytest.mark.faults("F50")
def test_the_message_shows_the_first_five_and_what_works_instead() -> None:
    other = HFTokenizer(byte_tokenizer())
    problem = mismatch(ids_of(HFTokenizer(character_tokenizer())), ids_of(other), "teachers.big", "kdrl")
    assert problem is not None
    assert problem.where == "teachers.big.path"
    assert problem.what.endswith(
        "1: '<bos>' and '<s>'; 2: '<eos>' and '</s>'; 3: '<unk>' and '<turn>'; 4: '0' and '!'; 5: '1' and '\"'"
    )
    assert "ampo" in (problem.fix or "")


@pytest.mark.faults("F50")
def test_the_same_words_put_together_otherwise_are_not_the_same(tmp_path: Path, policy: Path) -> None:
    """The map from token to id is the same, and what is written of a text is not; negative control: the same twice."""
    student = HFTokenizer.load(str(policy))
    before, decodes = byte_tokenizer(), byte_tokenizer()
    before.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    decodes.backend_tokenizer.decoder = decoders.Fuse()
    for made, said in ((before, r"from place 0 on: \[\d+, .*are the policy's"), (decodes, "reads the policy's tokens")):
        assert differing(ids_of(student), ids_of(HFTokenizer(made))) == []
        big = model(tmp_path / said[:4], made)
        with pytest.raises(ConfigError, match=said):
            known(config(policy, Signal.TEACHER, big={"path": str(big)}), student)
        assert "big" in known(config(policy, Signal.TEACHER_TEXT, big={"path": str(big)}), student)  # text crosses
    assert retold(student, HFTokenizer(byte_tokenizer()), "teachers.big", "kdrl") is None


# --- the folders of a run's teachers


class Asks(GRPO):
    asks: ClassVar[frozenset[Signal]] = frozenset()

    @property
    def needs(self) -> frozenset[Signal]:
        return self.asks


def config(folder: Path, *signals: Signal, **teachers: Any) -> Config:
    algorithm = type("Asking", (Asks,), {"asks": frozenset(signals)})()
    made = {name: TeacherConfig(**t) if isinstance(t, dict) else t for name, t in teachers.items()}
    reference = made.pop("reference", ScorerConfig())
    return Config(ModelConfig(str(folder)), algorithm, DataConfig(), {}, Schedule(), reference=reference, teachers=made)


def model(folder: Path, tokenizer: Any, context: int | None = 64, rows: int = 300, ends: Any = None) -> Path:
    """A model's folder as far as it is read before anything is started."""
    tokenizer.save_pretrained(folder)
    content = {"model_type": "llama", "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(content | ({"max_position_embeddings": context} if context else {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    save_file({}, folder / "model.safetensors")
    return folder


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return model(tmp_path / "policy", byte_tokenizer())


def test_a_teacher_that_means_the_same(tmp_path: Path, policy: Path) -> None:
    big = model(tmp_path / "big", byte_tokenizer(), context=32, rows=512)
    found = known(config(policy, Signal.TEACHER, big={"path": str(big)}), HFTokenizer.load(str(policy)))
    assert found.keys() == {"big"}
    assert (found["big"].context, found["big"].vocabulary, found["big"].foreign_ends) == (32, 512, ())


def test_another_end_token_is_no_mismatch(tmp_path: Path, policy: Path) -> None:
    big = model(tmp_path / "big", byte_tokenizer(eos="<turn>"))
    student = HFTokenizer.load(str(policy))
    found = known(config(policy, Signal.TEACHER, big={"path": str(big)}), student)
    assert found["big"].foreign_ends == (student.eos,)
    both = model(tmp_path / "both", byte_tokenizer(eos="<turn>"), ends=[2, 3])
    assert known(config(policy, Signal.TEACHER, big={"path": str(both)}), student)["big"].foreign_ends == ()


@pytest.mark.faults("F50")
@pytest.mark.parametrize("signal", [Signal.TEACHER, Signal.TEACHER_TOPK])
def test_other_words_are_refused_for_log_probs(tmp_path: Path, policy: Path, signal: Signal) -> None:
    big = model(tmp_path / "big", character_tokenizer())
    with pytest.raises(
        ConfigError, match=r"teachers.big for log-probs, but [\d,]+ token ids mean other things"
    ) as caught:
        known(config(policy, signal, big={"path": str(big)}), HFTokenizer.load(str(policy)))
    assert caught.value.exit_code == 2


def test_other_words_are_refused_for_a_reference(tmp_path: Path, policy: Path) -> None:
    other = model(tmp_path / "other", character_tokenizer())
    wrong = config(policy, Signal.REFERENCE, reference=ScorerConfig(path=str(other)))
    with pytest.raises(ConfigError, match=r"reference"):
        known(wrong, HFTokenizer.load(str(policy)))


def test_text_crosses_vocabularies(tmp_path: Path, policy: Path) -> None:
    big = model(tmp_path / "big", character_tokenizer())
    found = known(config(policy, Signal.TEACHER_TEXT, big={"path": str(big)}), HFTokenizer.load(str(policy)))
    assert found["big"].tokenizer.decode(found["big"].tokenizer.encode("12")) == "12"


def test_who_is_not_asked_is_not_read(policy: Path) -> None:
    idle = config(policy, big={"path": "nowhere"})
    assert known(idle, HFTokenizer.load(str(policy))) == {}
    assert unused(idle) == ["teachers.big: not started, for the algorithm grpo asks no teacher"]
    assert unused(config(policy, Signal.TEACHER, big={})) == []


def test_a_folder_that_is_not_there_is_named(policy: Path) -> None:
    with pytest.raises(PreflightError, match=r"no such model folder: nowhere") as caught:
        known(config(policy, Signal.TEACHER_TEXT, big={"path": "nowhere"}), HFTokenizer.load(str(policy)))
    assert caught.value.problems[0].where == "teachers.big.path"


def test_a_context_that_a_teacher_has_not(policy: Path) -> None:
    wide = config(policy, Signal.TEACHER_TEXT, big={"writer": WriterConfig(context=65)})
    with pytest.raises(ConfigError, match=r"teachers.big.writer.context=65 is more than the model's 64"):
        known(wide, HFTokenizer.load(str(policy)))


# --- what a teacher wrote, in the policy's tokens


def test_a_text_becomes_the_policys_tokens_and_its_end() -> None:
    tokenizer = wrapped()
    read = reader(tokenizer)
    for text in ("It is 4.", "It is 4.<|im_end|>", "It is 4.</s>"):
        tokens = read(prompt_of(), text)
        assert not isinstance(tokens, str)
        assert tokenizer.decode(tokens, special=True) == "It is 4.</s>"
    assert read(prompt_of(), "") == "nothing but an end mark"
    assert "end token" in str(read(prompt_of(), "4</s> and"))


def test_an_opening_think_that_the_prompt_has_is_not_said_twice() -> None:
    tokenizer = wrapped()
    prompt = Prompt("p", tokenizer.encode("2+2?<think>\n"), "4")
    tokens = reader(tokenizer)(prompt, "<think>\nwell</think>4")
    assert not isinstance(tokens, str)
    assert tokenizer.decode(tokens) == "well</think>4"
