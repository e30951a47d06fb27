"""Where rows come from: files that are something else, parquet, Hugging Face folders, generators."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlkd.config.schema import Source
from rlkd.core.errors import DATA, USAGE, ConfigError, DataError
from rlkd.data import Rules, generators, load, reasoning_gym_child
from tests.rows import PLAIN, TOKENIZER, row

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
    with pytest.raises(DataError, match=re.escape(f"`{tmp_path / 'prompts'}`")):
        load(Source(path=str(tmp_path / "prompt" / "a.jsonl")), TOKENIZER, PLAIN)


@pytest.mark.parametrize("path", ["x" * 5000, "a\x00b", "no/such/folder/a"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_paths_that_cannot_exist(path: str, kind: Any) -> None:
    with pytest.raises(DataError, match="no such"):
        load(Source(kind=kind, path=path), TOKENIZER, PLAIN)


def test_a_folder_where_a_file_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder, not a file"):
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


@pytest.mark.faults("F43")
def test_parquet_with_nulls_names_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "answer": [1, 2, None], "id": ["x", None, None]}), path)
    with pytest.raises(DataError) as caught:
        load(Source(kind="parquet", path=str(path)), TOKENIZER, PLAIN)
    assert [(p.what, p.where) for p in caught.value.problems[1:]] == [
        ("'prompt' is null", f"{path}: row 2"),
        ("'answer' is null", f"{path}: row 3"),
    ]
    dataset = load(
        Source(kind="parquet", path=str(path)),
        TOKENIZER,
        Rules(1000, chat=False, bad_rows="drop", max_bad_fraction=1.0),
    )
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


@pytest.mark.stack
def test_reasoning_gym_is_the_same_in_every_process() -> None:
    """Made in this process, word_ladder's answers would depend on PYTHONHASHSEED."""
    code = "from rlkd.data.generators import reasoning_gym; print([*reasoning_gym('word_ladder', 4, 7, {})])"
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        found.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120))
    assert found[0].stdout == found[1].stdout
    assert "source_dataset" in found[0].stdout, found[0].stderr


@pytest.mark.stack
def test_reasoning_gym_entries_score_their_own_answers_in_full() -> None:
    import reasoning_gym

    for prompt in load(gym("arc_agi", size=2), TOKENIZER, Rules(100_000, chat=False)).prompts:
        entry = prompt.metadata["reasoning_gym"]["entry"]  # type: ignore[index]
        assert reasoning_gym.get_score_answer_fn("arc_agi")(prompt.answer, entry) == 1.0


def test_reasoning_gym_tasks_without_one_right_answer() -> None:
    assert {p.answer for p in load(gym("graph_color", size=2), TOKENIZER, PLAIN).prompts} == {""}


def test_reasoning_gym_composite_names_each_rows_task() -> None:
    parts: list[dict[str, Any]] = [{"name": n, "weight": 1, "config": {}} for n in ("gcd", "lcm")]
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
