"""Prompts from every kind of source: what a row becomes, what is left out, and what an error says."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlkd.config.schema import DataConfig, Source
from rlkd.core.errors import DATA, USAGE, ConfigError, DataError, PreflightError
from rlkd.data import Dataset, HFTokenizer, Rules, generators, load, load_data, reasoning_gym_child
from rlkd.data.dataset import BATCH
from rlkd.models.tiny import character_tokenizer
from tests.tokenizers import wrapped

TOKENIZER = wrapped()
PLAIN = Rules(max_prompt_tokens=1000, chat=False)


def lines(path: Path, rows: Sequence[Any]) -> Source:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Source(path=str(path))


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "answer": str(i), **more}


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
    [("4", "4"), (4, "4"), (4.0, "4"), (0.5, "0.5"), (10**30, str(10**30)), (1e300, "1e+300"), ("", "")],
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


def test_all_bad_rows_at_once_but_no_more_than_twenty(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["{"] * 30 + [row(0)] + ["[]"] * 2)
    with pytest.raises(DataError) as caught:
        load(source, TOKENIZER, PLAIN)
    head, *rest = caught.value.problems
    assert head.what == "of 33 rows 32 cannot be used (30 not JSON, 2 not an object); the first 20 follow"
    assert [p.where for p in rest] == [f"{tmp_path / 'a.jsonl'}:{i}" for i in range(1, 21)]


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["{"] * 30 + [row(0), {"prompt": "x"}])
    dataset = load(source, TOKENIZER, Rules(1000, chat=False, bad_rows="drop"))
    assert len(dataset.prompts) == 1
    assert str(dataset.funnel).startswith("32 rows → 1 valid → 1 within")
    assert dataset.warnings[0].startswith(
        f"data.train: 30 rows left out: not JSON, as {tmp_path / 'a.jsonl'}:1: not JSON"
    )
    assert dataset.warnings[1].startswith(f"data.train: 1 row left out: no 'answer', as {tmp_path / 'a.jsonl'}:32")


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


def test_duplicate_prompts_are_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    dataset = load(lines(file, [row(0), row(1), row(0), row(0)]), TOKENIZER, PLAIN)
    assert len(dataset.prompts) == 4
    assert dataset.warnings == (f"data.train: 2 of 4 prompts repeat an earlier one, as {file}:3 repeats {file}:1",)


def test_prompts_that_are_too_long_are_left_out_whole_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    dataset = load(lines(file, [row(0), row(1) | {"prompt": "y" * 50}]), TOKENIZER, Rules(11, chat=False))
    assert texts(dataset) == ["question 0"]  # 11 tokens: exactly as many as may be
    assert str(dataset.funnel) == "2 rows → 2 valid → 1 within 11 prompt tokens (longest is 51)"
    assert dataset.warnings == (f"data.train: 1 prompt over 11 tokens left out, as {file}:2 of 51",)


def test_prompts_that_are_too_long_can_be_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    source = lines(file, [row(0), row(1) | {"prompt": "y" * 50}])
    with pytest.raises(DataError, match="longest is 51") as caught:
        load(source, TOKENIZER, Rules(11, too_long="fail", chat=False))
    assert [(p.what, p.where) for p in caught.value.problems[1:]] == [("51 tokens", f"{file}:2")]


def test_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(lines(tmp_path / "a.jsonl", [row(i) for i in range(2000)]), TOKENIZER, Rules(10, chat=False))
    assert "2,000 rows → 2,000 valid → 0 within 10 prompt tokens (shortest is 11)" in str(caught.value)
    assert "at least 11" in str(caught.value)
    assert caught.value.exit_code == DATA


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="the dataset is empty"):
        load(Source(path=str(tmp_path / "a.jsonl")), TOKENIZER, PLAIN)


def test_nothing_valid(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 rows → 0 valid → 0 within") as caught:
        load(lines(tmp_path / "a.jsonl", ["{", "[]"]), TOKENIZER, Rules(1000, chat=False, bad_rows="drop"))
    assert "1 row left out: not JSON" in str(caught.value)


def test_characters_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"prompt": "1+2=", "answer": 3}, {"prompt": "one+2=", "answer": 3}])
    dataset = load(source, HFTokenizer(character_tokenizer()), Rules(100))
    assert dataset.warnings == ("data.train: 1 of 2 prompts hold characters that the tokenizer does not know",)


# Files that are something else


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"prompt": "x"}]', "one JSON array"),
        ("\ufeff{}".encode("utf-16-le"), "UTF-16"),
        (b"\x1f\x8b\x08\x00abc", "gzip"),
        (b"PAR1abc", "kind: parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_files_that_are_not_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(Source(path=str(tmp_path / "a.jsonl")), TOKENIZER, PLAIN)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_a_missing_path_names_three_near_ones(tmp_path: Path, kind: Any) -> None:
    for name in ("train-1.jsonl", "train-2.jsonl", "train-3.jsonl", "train-4.jsonl", "zebra"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError) as caught:
        load(Source(kind=kind, path=str(tmp_path / "train.jsonl")), TOKENIZER, PLAIN)
    assert caught.value.exit_code == DATA
    assert str(caught.value).count("train-") == 3


def test_a_missing_folder_names_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    with pytest.raises(DataError, match=f"`{tmp_path / 'prompts'}`"):
        load(Source(path=str(tmp_path / "prompt" / "a.jsonl")), TOKENIZER, PLAIN)


def test_a_folder_where_a_file_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load(Source(path=str(tmp_path)), TOKENIZER, PLAIN)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(), "no path given"),
        (Source(path="x", size=0), "size must be at least 1"),
        (Source(kind="reasoning_gym", path="gcd"), "how many rows"),
        (Source(kind="arithmetic"), "how many rows"),
    ],
)
def test_settings_that_make_no_sense(source: Source, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(source, TOKENIZER, PLAIN)
    assert caught.value.exit_code == USAGE
    assert "data.train." in str(caught.value)


# Parquet and Hugging Face folders


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    chat = [{"role": "user", "content": "x", "name": None}]
    pq.write_table(pa.Table.from_pylist([{"prompt": chat, "answer": 4.0, "level": i} for i in range(3)]), path)
    dataset = load(Source(kind="parquet", path=str(path)), TOKENIZER, Rules(1000))
    assert [p.id for p in dataset.prompts] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]
    assert dataset.prompts[2].metadata == {"level": 2}
    assert (dataset.prompts[0].text, dataset.prompts[0].answer) == ("x", "4")


def test_parquet_with_nulls_names_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "answer": [1, 2, None], "id": ["x", None, None]}), path)
    with pytest.raises(DataError) as caught:
        load(Source(kind="parquet", path=str(path)), TOKENIZER, PLAIN)
    assert [(p.what, p.where) for p in caught.value.problems[1:]] == [
        ("'prompt' is null", f"{path}: row 2"),
        ("'answer' is null", f"{path}: row 3"),
    ]
    dataset = load(Source(kind="parquet", path=str(path)), TOKENIZER, Rules(1000, chat=False, bad_rows="drop"))
    assert [p.id for p in dataset.prompts] == ["x"]


def test_parquet_with_text_that_is_not_utf8_spoils_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"prompt": broken, "answer": [1, 2, 3]}), path)
    with pytest.raises(DataError, match="a value cannot be read") as caught:
        load(Source(kind="parquet", path=str(path)), TOKENIZER, PLAIN)
    assert [p.where for p in caught.value.problems[1:]] == [f"{path}: row 2"]


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"promt": ["a"], "answer": [1]}), path)
    with pytest.raises(DataError, match="did you mean `promt`") as caught:
        load(Source(kind="parquet", path=str(path)), TOKENIZER, PLAIN)
    assert "its columns: promt, answer" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"PAR1" + b"\x00" * 100 + b"PAR1"])
def test_a_file_that_is_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load(Source(kind="parquet", path=str(tmp_path / "a.parquet")), TOKENIZER, PLAIN)


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"q{i}" * 20 for i in range(2000)], "answer": list(range(2000))}), path)
    content = bytearray(path.read_bytes())
    content[4:3000] = b"\xaa" * 2996
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read"):
        load(Source(kind="parquet", path=str(path)), TOKENIZER, PLAIN)


def saved(path: Path, **splits: list[dict[str, Any]]) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(path)
    return str(path)


def test_huggingface_folder_with_splits(tmp_path: Path) -> None:
    path = saved(tmp_path / "gsm", train=[row(0), row(1)], test=[row(2)])
    dataset = load(Source(kind="huggingface", path=path, split="test"), TOKENIZER, PLAIN)
    assert [(p.id, p.text) for p in dataset.prompts] == [("gsm:1", "question 2")]


def test_huggingface_without_the_split(tmp_path: Path) -> None:
    path = saved(tmp_path / "gsm", train=[row(0)], test=[row(2)])
    with pytest.raises(DataError, match="did you mean `test`") as caught:
        load(Source(kind="huggingface", path=path, split="tests"), TOKENIZER, PLAIN)
    assert "its splits: train, test" in str(caught.value)


def test_huggingface_folder_of_one_dataset(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "gsm", train=[row(0), row(1)])) / "train"
    assert len(load(Source(kind="huggingface", path=str(path)), TOKENIZER, PLAIN).prompts) == 2
    with pytest.raises(DataError, match="no split `test`"):
        load(Source(kind="huggingface", path=str(path), split="test"), TOKENIZER, PLAIN)


def test_huggingface_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load(Source(kind="huggingface", path=str(tmp_path / "model")), TOKENIZER, PLAIN)
    with pytest.raises(DataError, match="save_to_disk"):
        load(Source(kind="huggingface", path="openai/gsm8k"), TOKENIZER, PLAIN)


def test_huggingface_folder_that_lost_a_file(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "gsm", train=[row(0)]))
    next((path / "train").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load(Source(kind="huggingface", path=str(path)), TOKENIZER, PLAIN)


# Generators


def test_arithmetic_splits_share_nothing() -> None:
    both = [
        {p.text for p in load(Source(kind="arithmetic", size=500, split=split), TOKENIZER, PLAIN).prompts}
        for split in ("train", "holdout")
    ]
    assert [len(b) for b in both] == [500, 500]
    assert not both[0] & both[1]
    with pytest.raises(DataError, match="train, holdout"):
        load(Source(kind="arithmetic", size=5, split="test"), TOKENIZER, PLAIN)


def gym(task: str, **changes: Any) -> Source:
    return Source(kind="reasoning_gym", path=task, **{"size": 5, **changes})


def test_reasoning_gym_keeps_the_whole_entry() -> None:
    import reasoning_gym

    options = {"min_terms": 3, "max_terms": 3}
    dataset = load(gym("chain_sum", seed=3, options=options), TOKENIZER, PLAIN)
    entries = list(reasoning_gym.create_dataset("chain_sum", size=5, seed=3, **options))
    assert [p.text for p in dataset.prompts] == [e["question"] for e in entries]
    assert [p.answer for p in dataset.prompts] == [e["answer"] for e in entries]
    assert [p.metadata["reasoning_gym"] for p in dataset.prompts] == [
        {"task": "chain_sum", "entry": e} for e in entries
    ]
    assert dataset.prompts[0].id == "chain_sum:1"
    json.dumps(dict(dataset.prompts[0].metadata), allow_nan=False)


def test_reasoning_gym_is_the_same_in_every_process() -> None:
    """Made in this process, word_ladder's answers would depend on PYTHONHASHSEED."""
    code = "from rlkd.data.generators import reasoning_gym; print([*reasoning_gym('word_ladder', 4, 7, {})])"
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        found.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120))
    assert found[0].stdout == found[1].stdout
    assert "source_dataset" in found[0].stdout, found[0].stderr


def test_reasoning_gym_entries_score_their_own_answers_in_full() -> None:
    import reasoning_gym

    for prompt in load(gym("arc_agi", size=2), TOKENIZER, Rules(100_000, chat=False)).prompts:
        entry = prompt.metadata["reasoning_gym"]["entry"]  # type: ignore[index]
        assert reasoning_gym.get_score_answer_fn("arc_agi")(prompt.answer, entry) == 1.0


def test_reasoning_gym_tasks_without_one_right_answer() -> None:
    assert {p.answer for p in load(gym("graph_color", size=2), TOKENIZER, PLAIN).prompts} == {""}


def test_reasoning_gym_composite_names_each_rows_task() -> None:
    parts = [{"name": n, "weight": 1, "config": {}} for n in ("gcd", "lcm")]
    dataset = load(gym("composite", size=20, options={"datasets": parts}), TOKENIZER, PLAIN)
    assert {p.metadata["reasoning_gym"]["task"] for p in dataset.prompts} == {"gcd", "lcm"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (gym("chain_sums"), "did you mean `chain_sum`"),
        (gym("chain_sum", options={"min_trems": 2}), "did you mean `min_terms`"),
        (gym("chain_sum", options={"seed": 2}), "has no option `seed`"),
        (gym("chain_sum", options={"min_terms": -2}), "min_terms must be positive"),
        (gym("chain_sum", options={"min_terms": "two"}), "TypeError"),
        (gym("chain_sum", options={"min_terms": {1}}), "not plain values"),
        (gym("composite"), "at least one dataset"),
    ],
)
def test_reasoning_gym_settings_that_do_not_work(monkeypatch: pytest.MonkeyPatch, source: Source, message: str) -> None:
    def in_this_process(request: Mapping[str, Any]) -> Mapping[str, Any]:
        return reasoning_gym_child.make(**json.loads(generators.as_json(request)))

    monkeypatch.setattr(generators, "in_child", in_this_process)
    with pytest.raises(DataError, match=message):
        load(source, TOKENIZER, PLAIN)


def test_a_generator_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.data.generators.GENERATE_TIMEOUT_S", 0.01)
    with pytest.raises(DataError, match="made no 5 rows"):
        load(gym("chain_sum"), TOKENIZER, PLAIN)


# The recipe's data section


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
