"""Worked answers with the prompts: columns, files of traces, the arithmetic generator; and the tokenizer's spans."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rlkd.config.schema import DataConfig, Source
from rlkd.core.errors import DATA, PREFLIGHT, ConfigError, DataError, PreflightError
from rlkd.core.types import Prompt
from rlkd.data import Dataset, HFTokenizer, Rules, load, load_data
from rlkd.data.demonstrations import cleaned
from rlkd.models.arithmetic import final_answer
from rlkd.models.tiny import character_tokenizer
from rlkd.rewards.arithmetic import Arithmetic
from tests.rows import PLAIN, TOKENIZER, lines, row
from tests.small_tokenizers import byte_tokenizer, wrapped


def from_column(tmp_path: Path, *values: Any, rules: Rules = PLAIN) -> Dataset:
    """One row for each value of its column `worked`; None: the row lacks it."""
    rows = [row(i, **({} if value is None else {"worked": value})) for i, value in enumerate(values)]
    source = lines(tmp_path / "a.jsonl", rows)
    return load(Source(path=source.path, demonstrations="worked"), TOKENIZER, rules)


def with_traces(tmp_path: Path, rows: list[Any], prompts: int = 2, rules: Rules = PLAIN) -> Dataset:
    source = lines(tmp_path / "a.jsonl", [row(i, id=f"q{i}") for i in range(prompts)])
    traces = lines(tmp_path / "traces.jsonl", rows)
    return load(Source(path=source.path, traces=traces.path), TOKENIZER, rules)


def worked(prompt: Prompt) -> list[tuple[str, str]]:
    """(teacher, text) of each, with the end token written out."""
    return [(d.teacher, TOKENIZER.decode(d.tokens, special=True)) for d in prompt.demonstrations]


# Columns


def test_a_text_a_record_or_a_list_of_them(tmp_path: Path) -> None:
    record = {"teacher": "bob", "text": "2", "quality": 0.5}
    dataset = from_column(tmp_path, "1", record, ["3", record], None, [])
    assert [worked(p) for p in dataset.prompts] == [
        [("data", "1</s>")],
        [("bob", "2</s>")],
        [("data", "3</s>"), ("bob", "2</s>")],
        [],
        [],
    ]
    assert dataset.prompts[1].demonstrations[0].quality == 0.5
    assert math.isnan(dataset.prompts[0].demonstrations[0].quality)
    assert all("worked" not in p.metadata for p in dataset.prompts)
    assert str(dataset.funnel).endswith("\n4 demonstrations of 3 of 5 prompts")
    assert not dataset.warnings


def test_the_fields_of_published_data_sets(tmp_path: Path) -> None:
    ampo = {"content": "a", "source": "qwen", "quality_score": 3, "num_tokens": 9}
    luffy = [{"role": "assistant", "content": "b"}]
    dataset = from_column(tmp_path, ampo, luffy)
    assert [worked(p) for p in dataset.prompts] == [[("qwen", "a</s>")], [("data", "b</s>")]]
    assert dataset.prompts[0].demonstrations[0].quality == 3.0


def test_columnar_files(tmp_path: Path) -> None:
    records = [[{"teacher": "t", "text": "one", "quality": None}], None]
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": ["1", "2"], "worked": records}), tmp_path / "a.parquet")
    source = Source(kind="parquet", path=str(tmp_path / "a.parquet"), demonstrations="worked")
    assert [worked(p) for p in load(source, TOKENIZER, PLAIN).prompts] == [[("t", "one</s>")], []]
    missing = Source(kind="parquet", path=source.path, demonstrations="work")
    with pytest.raises(DataError, match=r"no column `work`.*\n.*\n.*did you mean `worked`.*demonstrations: NAME"):
        load(missing, TOKENIZER, PLAIN)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "demonstration 1 is empty"),
        (["fine", " \n"], "demonstration 2 is empty"),
        (5, "must be a text or a record with a 'text', but is 5"),
        ([["x"]], "must be a text or a record"),
        ({"teacher": "t"}, "demonstration 1: has no 'text'"),
        ({"text": 5}, "its text is 5"),
        ({"text": "x", "teacher": 5}, "its teacher must be a name"),
        ({"text": "x", "quality": "good"}, "its quality must be a number"),
        ({"text": "x", "quality": True}, "its quality must be a number"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_malformed_one_is_a_bad_row(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match="of 2 rows 1 cannot be used") as caught:
        from_column(tmp_path, "fine", value)
    assert message in caught.value.problems[1].what
    assert caught.value.problems[1].where == f"{tmp_path / 'a.jsonl'}:2"
    dropped = from_column(tmp_path, "fine", value, rules=Rules(1000, chat=False, bad_rows="drop", max_bad_fraction=1.0))
    assert len(dropped.prompts) == 1
    assert "1 row left out" in dropped.warnings[0]


def test_a_column_that_is_nowhere(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [row(0)])
    with pytest.raises(DataError, match="no prompt has a demonstration") as caught:
        load(Source(path=source.path, demonstrations="worked"), TOKENIZER, PLAIN)
    assert "is `worked` the column" in str(caught.value)
    assert caught.value.exit_code == DATA


# What becomes of a text


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("a", "", "a"),
        ("a\n", "", "a\n"),
        ("a</s>", "", "a"),
        ("a\n<|im_end|>\n", "", "a\n"),
        ("a<|im_end|><|endoftext|>", "", "a"),
        ("</s>a", "", "</s>a"),
        ("<think>\nb", "Q<think>\n", "b"),
        ("<think>\nb", "Q<think>", "<think>\nb"),
        ("<think>\nb", "Q", "<think>\nb"),
        ("b", "Q<think>\n", "b"),
    ],
)
def test_cleaned(text: str, prompt: str, expected: str) -> None:
    assert cleaned(text, prompt) == expected


def test_the_rendered_prompt_says_whether_thinking_has_begun(tmp_path: Path) -> None:
    thinks = wrapped("{{ messages[0]['content'] + '<think>\\n' }}")
    source = lines(tmp_path / "a.jsonl", [row(0, worked="<think>\nhm</think>1")])
    (prompt,) = load(Source(path=source.path, demonstrations="worked"), thinks, Rules(1000)).prompts
    whole = thinks.decode(np.concatenate([prompt.tokens, prompt.demonstrations[0].tokens]))
    assert whole == "question 0<think>\nhm</think>1"


def test_prompt_and_demonstration_are_one_text(tmp_path: Path) -> None:
    """No BOS in between, and the end token exactly once, whatever the text ended with."""
    dataset = from_column(tmp_path, "one", "two</s>", "three<|im_end|>\n</s>", rules=Rules(1000, chat=False))
    for prompt, text in zip(dataset.prompts, ["one", "two", "three"], strict=True):
        tokens = prompt.demonstrations[0].tokens
        assert TOKENIZER.decode(np.concatenate([prompt.tokens, tokens]), special=True) == f"<s>{prompt.text}{text}</s>"
        assert (tokens == TOKENIZER.eos).sum() == 1
        assert tokens.dtype == np.int32


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    """Never cut: 4 tokens and the end fit into 5, 5 do not."""
    rules = Rules(1000, chat=False, max_answer_tokens=5)
    dataset = from_column(tmp_path, ["1234", "12345"], "12345678", "a</s>b", "</s>", rules=rules)
    assert [[text for _, text in worked(p)] for p in dataset.prompts] == [["1234</s>"], [], [], []]
    assert dataset.warnings == (
        f"data.train: 2 demonstrations left out: over 5 tokens, as {tmp_path / 'a.jsonl'}:1",
        f"data.train: 1 demonstration left out: an end token in the middle, as {tmp_path / 'a.jsonl'}:3",
        f"data.train: 1 demonstration left out: nothing but an end mark, as {tmp_path / 'a.jsonl'}:4",
    )
    assert str(dataset.funnel).endswith("\n1 demonstration of 1 of 4 prompts")


def test_characters_without_a_token(tmp_path: Path) -> None:
    tiny = HFTokenizer(character_tokenizer())
    source = lines(tmp_path / "a.jsonl", [row(0) | {"prompt": "1+1=", "worked": ["#2", "two"]}])
    dataset = load(Source(path=source.path, demonstrations="worked"), tiny, PLAIN)
    assert [tiny.decode(d.tokens) for d in dataset.prompts[0].demonstrations] == ["#2"]
    assert "characters that the tokenizer does not know" in dataset.warnings[0]


def test_none_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 2 demonstrations can be used") as caught:
        from_column(tmp_path, ["123", "456"], rules=Rules(1000, chat=False, max_answer_tokens=2))
    assert "over 2 tokens" in str(caught.value)


def test_the_answers_limit_is_the_samplers(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [row(0, worked=["1234", "12345"])])
    config = DataConfig(train=Source(path=source.path, demonstrations="worked"), chat=False)
    data = load_data(config, TOKENIZER, context=50, answer_tokens=5)
    assert len(data.train.prompts[0].demonstrations) == 1
    assert any("over 5 tokens" in w for w in data.warnings)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: t.strip()))
@example("a<end_of_turn>b")
def test_any_text_comes_back_but_for_end_marks_at_its_end(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    assume(cleaned(text, "") == text)  # hypothesis tries the marks it reads in our own source, too
    prompt = from_column(tmp_path_factory.mktemp("d"), text).prompts[0]
    assert worked(prompt) == [("data", f"{text}</s>")]


# Traces


def test_traces_are_joined_by_id_behind_the_column(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [row(0, id="q0", worked="own"), row(1, id=7)])
    traces = [
        {"id": "q0", "teacher": "t", "text": "one", "quality": 2, "reward": 1.0, "finish": "stop"},
        {"id": 7, "teacher": "t", "text": "two"},
        {"id": "q0", "teacher": "u", "text": "three", "quality": None, "reward": None},
    ]
    lines(tmp_path / "traces.jsonl", traces)
    source = Source(path=str(tmp_path / "a.jsonl"), demonstrations="worked", traces=str(tmp_path / "traces.jsonl"))
    dataset = load(source, TOKENIZER, PLAIN)
    assert [worked(p) for p in dataset.prompts] == [
        [("data", "own</s>"), ("t", "one</s>"), ("u", "three</s>")],
        [("t", "two</s>")],
    ]
    assert [d.quality for d in dataset.prompts[0].demonstrations][1] == 2.0


def test_traces_that_were_written_down_as_wrong_or_cut(tmp_path: Path) -> None:
    """rlkd's own file of live traces keeps those too, and writes a text again once it is judged."""
    traces = [
        {"id": "q0", "teacher": "t", "text": "right", "reward": None, "finish": "stop"},
        {"id": "q0", "teacher": "t", "text": "right", "reward": 1.0, "finish": "stop"},
        {"id": "q0", "teacher": "u", "text": "wrong", "reward": None, "finish": "stop"},
        {"id": "q0", "teacher": "u", "text": "wrong", "reward": 0.1, "finish": "stop"},
        {"id": "q1", "teacher": "t", "text": "cut", "reward": None, "finish": "length"},
        {"id": "q1", "teacher": "u", "text": "", "reward": None, "finish": "length"},
        {"id": "q1", "teacher": "v", "text": "not a number", "reward": math.nan, "finish": "stop"},
    ]
    dataset = with_traces(tmp_path, traces)
    assert [worked(p) for p in dataset.prompts] == [[("t", "right</s>")], []]
    assert dataset.warnings[0].startswith("data.train: 4 traces left out: ")


def test_traces_of_nobody_are_counted(tmp_path: Path) -> None:
    dataset = with_traces(tmp_path, [{"id": "q0", "text": "x"}, {"id": "q9", "text": "y"}])
    assert dataset.warnings == (f"data.train: 1 trace of no prompt here, as {tmp_path / 'traces.jsonl'}:2",)


@pytest.mark.parametrize("rows", [[{"id": "other", "text": "x"}], []])
def test_a_file_of_traces_that_fits_no_prompt(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="no prompt has a demonstration") as caught:
        with_traces(tmp_path, rows)
    said = "theirs (`other`) are not those of the prompts (`q0`)" if rows else "has no trace that could be used"
    assert said in str(caught.value)


def test_rows_that_are_no_traces(tmp_path: Path) -> None:
    bad = ["{", {"text": "x"}, {"id": "q0"}, {"id": "q0", "text": 3}, {"id": "q0", "text": " "}]
    with pytest.raises(DataError) as caught:
        with_traces(tmp_path, [{"id": "q0", "text": "fine"}, *bad])
    head, *rows = caught.value.problems
    assert head.what == "5 rows of the file of traces cannot be used"
    assert [r.where for r in rows] == [f"{tmp_path / 'traces.jsonl'}:{i}" for i in range(2, 7)]
    dataset = with_traces(
        tmp_path,
        [{"id": "q0", "text": "fine"}, *bad],
        rules=Rules(1000, chat=False, bad_rows="drop", max_bad_fraction=1.0),
    )
    assert worked(dataset.prompts[0]) == [("data", "fine</s>")]
    assert "5 rows of the file of traces left out" in dataset.warnings[0]


def test_a_missing_file_of_traces(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [row(0)])
    with pytest.raises(DataError, match="no such file"):
        load(Source(path=source.path, traces=str(tmp_path / "trace.jsonl")), TOKENIZER, PLAIN)


# The fingerprint, messages


def test_the_fingerprint_covers_demonstrations(tmp_path: Path) -> None:
    prints = {
        from_column(tmp_path, value).fingerprint
        for value in ("a", "b", ["a", "b"], {"teacher": "t", "text": "a"}, {"text": "a", "quality": 1})
    }
    assert len(prints) == 5
    assert from_column(tmp_path, "a").fingerprint == from_column(tmp_path, ["a"]).fingerprint
    plain = lines(tmp_path / "b.jsonl", [row(0)])
    assert load(plain, TOKENIZER, PLAIN).fingerprint not in prints
    traced = with_traces(tmp_path, [{"id": "q0", "text": "x"}]).fingerprint
    assert traced != with_traces(tmp_path, [{"id": "q0", "text": "y"}]).fingerprint


def test_every_prompt_has_its_conversation(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b"}]
    source = lines(tmp_path / "a.jsonl", [row(0), row(1) | {"prompt": own}])
    plain, chat = load(source, TOKENIZER, Rules(1000, system="be brief")).prompts
    assert plain.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "question 0"})
    assert list(chat.messages) == own
    (first, _) = load(source, TOKENIZER, Rules(1000)).prompts
    assert first.messages == ({"role": "user", "content": "question 0"},)
    assert TOKENIZER.chat(chat.messages).tolist() == chat.tokens.tolist()
    text = load(lines(tmp_path / "b.jsonl", [row(3)]), TOKENIZER, PLAIN).prompts[0]
    assert text.messages == ({"role": "user", "content": "question 3"},)


# The arithmetic generator


def arithmetic(options: dict[str, Any], size: int = 40, **more: Any) -> Dataset:
    source = Source(kind="arithmetic", size=size, options=options, **more)
    return load(source, HFTokenizer(character_tokenizer()), Rules(100, max_answer_tokens=48))


def answers(dataset: Dataset) -> list[list[str]]:
    tokenizer = HFTokenizer(character_tokenizer())
    return [[tokenizer.decode(d.tokens) for d in p.demonstrations] for p in dataset.prompts]


def test_arithmetic_without_options_has_none() -> None:
    assert answers(arithmetic({})) == [[]] * 40
    assert arithmetic({}).fingerprint == arithmetic({"demonstrations": 0}).fingerprint


def test_a_pupil_who_forgets_nothing_is_always_right() -> None:
    dataset = arithmetic({"demonstrations": 2, "teacher": "bob"})
    for prompt, texts in zip(dataset.prompts, answers(dataset), strict=True):
        assert [final_answer(t) for t in texts] == [prompt.answer] * 2
        assert [d.teacher for d in prompt.demonstrations] == ["bob"] * 2
    assert not any(d.metadata for d in dataset.prompts)
    assert str(dataset.funnel).endswith("\n80 demonstrations of 40 of 40 prompts")


def test_a_pupil_who_forgets_is_wrong_now_and_then_and_always_in_the_same_places() -> None:
    options = {"demonstrations": 4, "forgets": 0.5}
    dataset = arithmetic(options)
    right = [final_answer(t) == p.answer for p, ts in zip(dataset.prompts, answers(dataset), strict=True) for t in ts]
    assert 0.2 < np.mean(right) < 0.9
    assert answers(arithmetic(options)) == answers(dataset)
    assert answers(arithmetic(options, seed=1)) != answers(dataset)
    assert answers(arithmetic(options, size=10)) == answers(dataset)[:10]
    assert any(len(set(texts)) > 1 for texts in answers(dataset))
    never = arithmetic({"demonstrations": 1, "forgets": 1.0})
    assert any(final_answer(t) != p.answer for p, (t,) in zip(never.prompts, answers(never), strict=True))


def test_what_a_pupil_writes_is_what_the_reward_likes() -> None:
    from rlkd.core.types import Answer, Finish

    dataset = arithmetic({"demonstrations": 1})
    for prompt, (text,) in zip(dataset.prompts, answers(dataset), strict=True):
        assert Arithmetic().score(prompt, [Answer(text, Finish.STOP, 1)]) == [1.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"demonstration": 1}, "has no option `demonstration`"),
        ({"demonstrations": -1}, "does not work with these options"),
        ({"demonstrations": 1.5}, "does not work with these options"),
        ({"demonstrations": True}, "does not work with these options"),
        ({"demonstrations": 1, "forgets": 2}, "does not work with these options"),
        ({"demonstrations": 1, "forgets": "often"}, "does not work with these options"),
        ({"demonstrations": 1, "teacher": ""}, "does not work with these options"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        arithmetic(options)


def test_a_generator_has_no_column() -> None:
    with pytest.raises(ConfigError, match="has no columns"):
        arithmetic({}, demonstrations="worked")


def test_traces_of_a_generator(tmp_path: Path) -> None:
    traces = tmp_path / "t.jsonl"
    traces.write_text(json.dumps({"id": "arithmetic-train:2", "teacher": "t", "text": "#1"}) + "\n")
    assert answers(arithmetic({}, size=3, traces=str(traces))) == [[], ["#1"], []]


# Spans


@pytest.mark.parametrize("text", ["", "ab", "a ü→b", "<answer> 825 </answer>"])
def test_spans_say_which_characters_a_token_stands_for(text: str) -> None:
    ids, spans = TOKENIZER.spans(text)
    assert (ids.dtype, spans.dtype, spans.shape) == (np.int32, np.int32, (len(ids), 2))
    assert ids.tolist() == TOKENIZER.encode_many([text], special=False)[0].tolist()  # no BOS
    covered = sorted({i for start, end in spans.tolist() for i in range(start, end)})
    assert covered == list(range(len(text)))


def test_a_slow_tokenizer_has_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = byte_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", property(lambda _: False))
    with pytest.raises(PreflightError, match="no fast one") as caught:
        HFTokenizer(slow).spans("x")
    assert caught.value.exit_code == PREFLIGHT
