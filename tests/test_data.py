"""Prompts from every kind of source: what a row becomes, what is left out, and what an error says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkd.config.schema import DataConfig, Source
from rlkd.core.errors import DATA, ConfigError, DataError, PreflightError
from rlkd.data import Dataset, HFTokenizer, Rules, load, load_data
from rlkd.data.dataset import BATCH
from rlkd.models.tiny import character_tokenizer
from tests.rows import PLAIN, TOKENIZER, lines, row
from tests.small_tokenizers import wrapped


def texts(dataset: Dataset) -> list[str]:
    return [TOKENIZER.decode(p.tokens) for p in dataset.prompts]


# Rows that are fine


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [row(0, id="first", level=3, tags=["x"]), row(1)])
    dataset = load(source, TOKENIZER, PLAIN)
    first, second = dataset.prompts
    assert (first.id, first.text, first.answer, first.source) == ("first", "question 0", "0", "a.jsonl")
    assert first.metadata == {"level": 3, "tags": ["x"]}
    assert second.id == "a.jsonl:2"
    assert texts(dataset) == ["question 0", "question 1"]
    assert not dataset.warnings
    assert str(dataset.funnel) == "2 rows → 2 valid → 2 within 1,000 prompt tokens (longest is 11)"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", "4"),
        (4, "4"),
        (4.0, "4"),
        (0.5, "0.5"),
        (10**30, str(10**30)),
        (10**400, str(10**400)),
        (1e300, "1e+300"),
        ("", ""),
    ],
)
def test_answers_become_text(tmp_path: Path, answer: object, expected: str) -> None:
    dataset = load(lines(tmp_path / "a.jsonl", [row(0) | {"answer": answer}]), TOKENIZER, PLAIN)
    assert dataset.prompts[0].answer == expected


def test_columns_by_other_names(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"q": "x", "a": 1, "key": 7, "id": "other"}])
    source = Source(path=str(tmp_path / "a.jsonl"), prompt="q", answer="a", id="key")
    prompt = load(source, TOKENIZER, PLAIN).prompts[0]
    assert (prompt.text, prompt.answer, prompt.id, prompt.metadata) == ("x", "1", "7", {"id": "other"})


def test_byte_order_mark_blank_lines_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\r\n\r\n  \n" + json.dumps(row(1)).encode())
    assert [p.id for p in load(Source(path=str(path)), TOKENIZER, PLAIN).prompts] == ["a.jsonl:1", "a.jsonl:4"]


def test_at_most_size_rows_of_a_file(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [row(0), row(1), "not read"])
    dataset = load(Source(path=str(tmp_path / "a.jsonl"), size=2), TOKENIZER, PLAIN)
    assert dataset.funnel.read == 2


def test_more_rows_than_are_tokenised_at_once(tmp_path: Path) -> None:
    n = 2 * BATCH + 1
    dataset = load(lines(tmp_path / "a.jsonl", [row(i) for i in range(n)]), TOKENIZER, PLAIN)
    assert texts(dataset) == [f"question {i}" for i in range(n)]


def test_the_chat_template_and_the_system_message(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b", "name": None}]
    source = lines(tmp_path / "a.jsonl", [row(0), row(1) | {"prompt": own}])
    dataset = load(source, TOKENIZER, Rules(1000, system="be brief"))
    assert [TOKENIZER.decode(p.tokens, special=True) for p in dataset.prompts] == [
        "<s>system:be brief<turn>user:question 0<turn>assistant:",
        "<s>system:mine<turn>user:b<turn>assistant:",
    ]
    assert [p.text for p in dataset.prompts] == ["question 0", "b"]


def test_a_system_message_without_chat(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.chat"):
        load(lines(tmp_path / "a.jsonl", [row(0)]), TOKENIZER, Rules(1000, chat=False, system="x"))


def test_no_chat_template_is_found_before_any_row(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="no chat template"):
        load(Source(path=str(tmp_path / "missing")), wrapped(template=None), Rules(1000))


# Rows that are not


BAD = [
    ("{", "not JSON"),
    ('{"prompt": "x", "answer": "1", "prompt": "y"}', "the field 'prompt' is there twice"),
    ("[1]", "not a JSON object"),
    ("null", "not a JSON object"),
    ('{"prompt": "a\x00b", "answer": "1"}', "not JSON"),
    ('{"prompt": "\\ud800", "answer": "1"}', "lone surrogate"),
    ('{"answer": "1"}', "no field 'prompt'; it has answer"),
    ('{"prompt": "x"}', "no field 'answer'"),
    ('{"prompt": null, "answer": "1"}', "'prompt' is null"),
    ('{"prompt": "x", "answer": null}', "'answer' is null"),
    ('{"prompt": " \\n", "answer": "1"}', "the prompt is empty"),
    ('{"prompt": 5, "answer": "1"}', "must be a string or a list of chat messages, not 5"),
    ('{"prompt": [], "answer": "1"}', "must be a string or a list of chat messages"),
    ('{"prompt": ["x"], "answer": "1"}', "message 1 must have role and content"),
    ('{"prompt": [{"role": "user"}], "answer": "1"}', "message 1 has no 'content'"),
    ('{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "answer": "1"}', "'content' must be text"),
    ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}', "the last message is the assistant's"),
    ('{"prompt": "x", "answer": true}', "the answer must be text or a number, not True"),
    ('{"prompt": "x", "answer": {}}', "the answer must be text or a number, not dict"),
    ('{"prompt": "x", "answer": NaN}', "the answer is nan"),
    ('{"prompt": "x", "answer": "1", "id": []}', "the id must be"),
    ('{"prompt": "x", "answer": "1", "id": ""}', "the id is empty"),
    ('{"prompt": "x", "answer": ' + "1" * 5000 + "}", "not JSON that can be read"),
    ('{"prompt": "x", "answer": "1", "m": ' + "[" * 70 + "]" * 70 + "}", "more than 64 levels"),
    ("[" * 100_000, "not JSON that can be read"),
]


@pytest.mark.faults("F43")
@pytest.mark.parametrize(("text", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    source = lines(tmp_path / "a.jsonl", [row(0), text])
    with pytest.raises(DataError) as caught:
        load(source, TOKENIZER, Rules(1000))
    head, bad = caught.value.problems
    assert head.what.startswith("of 2 rows 1 cannot be used")
    assert message in bad.what
    assert len(bad.what) < 250
    assert bad.where == f"{tmp_path / 'a.jsonl'}:2"
    assert caught.value.exit_code == DATA


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(row(0)).encode() + b'\n{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(DataError, match="byte 13 is not UTF-8"):
        load(Source(path=str(path)), TOKENIZER, PLAIN)


@pytest.mark.faults("F43")
def test_all_bad_rows_at_once_but_no_more_than_twenty(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["{"] * 30 + [row(0)] + ["[]"] * 2)
    with pytest.raises(DataError) as caught:
        load(source, TOKENIZER, PLAIN)
    head, *rest = caught.value.problems
    assert head.what == "of 33 rows 32 cannot be used (30 not JSON, 2 not an object); the first 20 follow"
    assert [p.where for p in rest] == [f"{tmp_path / 'a.jsonl'}:{i}" for i in range(1, 21)]


@pytest.mark.faults("F43")
def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["{"] * 30 + [row(0), {"prompt": "x"}])
    dataset = load(source, TOKENIZER, Rules(1000, chat=False, bad_rows="drop", max_bad_fraction=1.0))
    assert len(dataset.prompts) == 1
    assert str(dataset.funnel).startswith("32 rows → 1 valid → 1 within")
    assert dataset.warnings[0].startswith(
        f"data.train: 30 rows left out: not JSON, as {tmp_path / 'a.jsonl'}:1: not JSON"
    )
    assert dataset.warnings[1].startswith(f"data.train: 1 row left out: no 'answer', as {tmp_path / 'a.jsonl'}:32")


@pytest.mark.faults("F43")
@pytest.mark.parametrize(("bad", "share", "fits"), [(2, 0.1, True), (3, 0.1, False), (3, 0.15, True), (1, 0.0, False)])
def test_no_more_bad_rows_than_a_share_are_left_out(tmp_path: Path, bad: int, share: float, fits: bool) -> None:
    source = lines(tmp_path / "a.jsonl", ["{"] * bad + [row(i) for i in range(20 - bad)])
    rules = Rules(1000, chat=False, bad_rows="drop", max_bad_fraction=share)
    if fits:
        assert len(load(source, TOKENIZER, rules).prompts) == 20 - bad
    else:
        with pytest.raises(DataError, match=rf"of 20 rows {bad} cannot be used \({bad} not JSON\)"):
            load(source, TOKENIZER, rules)


def test_chat_messages_without_chat(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "x"}], "answer": "1"}])
    with pytest.raises(DataError, match=r"data\.chat is off"):
        load(source, TOKENIZER, PLAIN)


def test_rows_that_the_chat_template_refuses(tmp_path: Path) -> None:
    refusing = wrapped("{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}x")
    source = lines(tmp_path / "a.jsonl", [row(0), row(1) | {"prompt": [{"role": "user", "content": "a"}] * 2}])
    with pytest.raises(DataError, match="does not take it: one message only") as caught:
        load(source, refusing, Rules(1000))
    assert caught.value.problems[1].where == f"{tmp_path / 'a.jsonl'}:2"


def test_a_prompt_of_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="makes no token"):
        load(lines(tmp_path / "a.jsonl", [row(0)]), wrapped("{% if false %}x{% endif %}"), Rules(1000))


def test_a_wrong_column_name_suggests_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt=prompts under the data source"):
        load(lines(tmp_path / "a.jsonl", [{"prompts": "x", "answer": 1}]), TOKENIZER, PLAIN)


# Ids, repeats, lengths


@pytest.mark.faults("F47")
@pytest.mark.parametrize("bad_rows", ["fail", "drop"])
def test_duplicate_ids_name_both_lines(tmp_path: Path, bad_rows: Any) -> None:
    source = lines(tmp_path / "a.jsonl", [row(0, id="x"), row(1), row(2, id="x"), row(3, id="a.jsonl:2")])
    with pytest.raises(DataError) as caught:
        load(source, TOKENIZER, Rules(1000, chat=False, bad_rows=bad_rows))
    head, *rest = caught.value.problems
    file = tmp_path / "a.jsonl"
    assert head.what == "2 rows with an id that is taken"
    assert [(p.what, p.where) for p in rest] == [
        (f"id 'x' is already at {file}:1", f"{file}:3"),
        (f"id 'a.jsonl:2' is already at {file}:2", f"{file}:4"),
    ]


def test_bad_rows_and_duplicate_ids_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(lines(tmp_path / "a.jsonl", [row(0, id="x"), row(1, id="x"), "{"]), TOKENIZER, PLAIN)
    assert {p.code for p in caught.value.problems} == {"RLKD-D110", "RLKD-D111", "RLKD-D116", "RLKD-D117"}


@pytest.mark.faults("F47")
def test_duplicate_prompts_are_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    dataset = load(lines(file, [row(0), row(1), row(0), row(0)]), TOKENIZER, PLAIN)
    assert len(dataset.prompts) == 4
    assert dataset.warnings == (f"data.train: 2 of 4 prompts repeat an earlier one, as {file}:3 repeats {file}:1",)


@pytest.mark.faults("F45")
def test_prompts_that_are_too_long_are_left_out_whole_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    dataset = load(lines(file, [row(0), row(1) | {"prompt": "y" * 50}]), TOKENIZER, Rules(11, chat=False))
    assert texts(dataset) == ["question 0"]  # 11 tokens: exactly as many as may be
    assert str(dataset.funnel) == "2 rows → 2 valid → 1 within 11 prompt tokens (longest is 51)"
    assert dataset.warnings == (f"data.train: 1 prompt over 11 tokens left out, as {file}:2 of 51",)


@pytest.mark.faults("F45")
def test_prompts_that_are_too_long_can_be_cut_on_the_left(tmp_path: Path) -> None:
    """Text, messages and tokens are of the same prompt then; what comes last of the question stays."""
    file = tmp_path / "a.jsonl"
    rows = [row(0), row(1) | {"prompt": "y" * 50 + "?"}, row(2) | {"prompt": "z" * 60}]
    dataset = load(lines(file, rows), TOKENIZER, Rules(11, too_long="truncate_left", chat=False))
    assert texts(dataset) == ["question 0", "y" * 9 + "?", "z" * 10]
    assert [len(p.tokens) for p in dataset.prompts] == [11, 11, 11]  # with BOS
    assert [p.text for p in dataset.prompts] == texts(dataset)
    assert str(dataset.funnel) == "3 rows → 3 valid → 3 within 11 prompt tokens (longest is 61)"
    assert dataset.warnings == (f"data.train: 2 prompts over 11 tokens cut on the left, as {file}:2 of 52",)


@pytest.mark.faults("F45")
def test_a_cut_prompt_has_its_whole_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    own = [{"role": "user", "content": "x" * 50}]
    rows = [row(0) | {"prompt": "y" * 80 + "?"}, row(1) | {"prompt": own}]
    whole = load(lines(file, rows), TOKENIZER, Rules(999, system="be brief")).prompts[0]
    frame = len(whole.tokens) - 81
    rules = Rules(frame + 5, too_long="truncate_left", system="be brief")
    dataset = load(lines(file, rows), TOKENIZER, rules)
    (prompt,) = dataset.prompts
    assert prompt.text == "yyyy?"
    assert prompt.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "yyyy?"})
    assert TOKENIZER.decode(prompt.tokens, special=True) == TOKENIZER.decode(whole.tokens, special=True).replace(
        "y" * 80 + "?", "yyyy?"
    )
    assert [w.split(", as")[0] for w in dataset.warnings] == [
        f"data.train: 1 prompt over {frame + 5} tokens cut on the left",
        f"data.train: 1 prompt over {frame + 5} tokens left out",
    ]
    with pytest.raises(DataError, match="no prompt is left"):  # a frame that is too large by itself
        load(lines(file, rows), TOKENIZER, replace(rules, max_prompt_tokens=frame))


@pytest.mark.faults("F45")
def test_prompts_that_are_too_long_can_be_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    source = lines(file, [row(0), row(1) | {"prompt": "y" * 50}])
    with pytest.raises(DataError, match="longest is 51") as caught:
        load(source, TOKENIZER, Rules(11, too_long="fail", chat=False))
    assert [(p.what, p.where) for p in caught.value.problems[1:]] == [("51 tokens", f"{file}:2")]


@pytest.mark.faults("F44")
def test_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(lines(tmp_path / "a.jsonl", [row(i) for i in range(2000)]), TOKENIZER, Rules(10, chat=False))
    assert "2,000 rows → 2,000 valid → 0 within 10 prompt tokens (shortest is 11)" in str(caught.value)
    assert "at least 11" in str(caught.value)
    assert caught.value.exit_code == DATA


@pytest.mark.faults("F44")
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="the dataset is empty"):
        load(Source(path=str(tmp_path / "a.jsonl")), TOKENIZER, PLAIN)


@pytest.mark.faults("F44")
def test_nothing_valid(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 rows → 0 valid → 0 within") as caught:
        load(
            lines(tmp_path / "a.jsonl", ["{", "[]"]),
            TOKENIZER,
            Rules(1000, chat=False, bad_rows="drop", max_bad_fraction=1.0),
        )
    assert "1 row left out: not JSON" in str(caught.value)


def test_characters_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": "1+2=", "answer": 3}, {"prompt": "one+2=", "answer": 3}])
    dataset = load(source, HFTokenizer(character_tokenizer()), Rules(100))
    assert dataset.warnings == ("data.train: 1 of 2 prompts hold characters that the tokenizer does not know",)


# The recipe's data section


@pytest.mark.faults("F48")
def test_train_and_holdout(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", [row(i) for i in range(5)])
    holdout = lines(tmp_path / "test.jsonl", [row(i) for i in range(3, 7)])
    data = load_data(DataConfig(train, holdout, chat=False), TOKENIZER, context=40, answer_tokens=20)
    assert data.train.funnel.limit == 20
    assert data.holdout is not None
    assert len(data.holdout.prompts) == 4
    assert data.warnings == (
        "data.holdout: 2 of 4 held-out prompts are trained on too, as test.jsonl:1 (training: train.jsonl:4)",
    )
    assert load_data(DataConfig(train, chat=False), TOKENIZER, 40, 20).holdout is None


@pytest.mark.parametrize(
    ("limit", "context", "answer", "message"),
    [(None, 20, 20, "leave no room"), (25, 40, 20, "at most 20"), (0, 40, 20, "at least 1")],
)
def test_lengths_that_do_not_fit(tmp_path: Path, limit: int | None, context: int, answer: int, message: str) -> None:
    config = DataConfig(lines(tmp_path / "a.jsonl", [row(0)]), max_prompt_tokens=limit)
    with pytest.raises(ConfigError, match=message):
        load_data(config, TOKENIZER, context, answer)


# The fingerprint


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, rows: list[dict[str, Any]], rules: Rules = PLAIN) -> str:
        (tmp_path / folder).mkdir()
        return load(lines(tmp_path / folder / "a.jsonl", rows), TOKENIZER, rules).fingerprint

    base = fingerprint("one", [row(0), row(1)])
    assert fingerprint("two", [row(0), row(1)]) == base
    others = [
        fingerprint("order", [row(1), row(0)]),
        fingerprint("answer", [row(0), row(1) | {"answer": "2"}]),
        fingerprint("prompt", [row(0), row(2) | {"answer": "1"}]),
        fingerprint("id", [row(0), row(1, id="x")]),
        fingerprint("metadata", [row(0), row(1, level=1)]),
        fingerprint("fewer", [row(0)]),
        fingerprint("template", [row(0), row(1)], Rules(1000)),
    ]
    assert len({base, *others}) == 8
