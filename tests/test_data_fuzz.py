"""Whatever the bytes are: prompts, or one DataError that says where. RLKD_FUZZ=N: N inputs of each."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlkd.config.schema import Source
from rlkd.core.errors import DATA, DataError
from rlkd.data import Dataset, Rules, load
from rlkd.data.rows import BadRow, Columns, Question, Row, question
from tests.small_tokenizers import wrapped

TOKENIZER = wrapped()
FILES, ROWS = (int(os.environ.get("RLKD_FUZZ", usual)) for usual in (200, 500))

text = st.text(st.characters(), max_size=12)  # lone surrogates and NUL too
numbers = st.one_of(st.integers(), st.builds(lambda i, j: i * 10**j, st.integers(), st.integers(0, 4000)), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=12,
)
message = st.one_of(
    values,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | values, "content": text | values}
    ),
)
prompts = st.one_of(text, values, st.lists(message, max_size=4))
rows = st.fixed_dictionaries({}, optional={"prompt": prompts, "answer": values, "id": values, "more": values})
good = st.builds(lambda i: json.dumps({"prompt": f"q{i}", "answer": i}).encode(), st.integers(0, 9))


def spoiled(line: bytes, cut: int, byte: int) -> bytes:
    """A line cut short, with one byte changed."""
    line = line[: max(1, cut % (len(line) + 1))]
    at = byte % len(line)
    return line[:at] + bytes([byte % 256]) + line[at + 1 :]


lines = st.one_of(
    good,
    st.binary(max_size=40),
    st.one_of(rows, values).map(lambda value: json.dumps(value).encode()),
    st.builds(spoiled, rows.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
              st.integers(0, 10**6), st.integers(0, 10**6)),
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows.jsonl"


def prompts_or_error(source: Source, rules: Rules) -> Dataset | DataError:
    try:
        return load(source, TOKENIZER, rules)
    except DataError as error:
        return error


@pytest.mark.faults("F43")
@settings(max_examples=FILES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(lines, min_size=1, max_size=12), st.sampled_from(["fail", "drop"]), st.booleans())
@example([b"\x00" * 100], "fail", True)
@example([b'{"prompt": "x", "answer": 1e999}'], "fail", True)
@example([b'{"prompt": "x", "answer": -' + b"9" * 4301 + b"}"], "drop", False)
@example([b'{"a":' * 50_000], "fail", True)
@example([b'{"prompt": "x", "answer": ' + b"9" * 4000 + b', "id": 1e308}'], "fail", True)
def test_any_bytes_give_prompts_or_a_data_error(
    file: Path, content: list[bytes], bad_rows: Literal["fail", "drop"], chat: bool
) -> None:
    file.write_bytes(b"\n".join(content))
    source, rules = Source(path=str(file)), Rules(60, bad_rows=bad_rows, chat=chat)
    found = prompts_or_error(source, rules)
    if isinstance(found, DataError):
        assert found.exit_code == DATA
        assert all(problem.where and str(file) in problem.where for problem in found.problems)
        assert all(len(problem.what) < 1000 for problem in found.problems)
        str(found).encode()  # can be printed
        return
    funnel = found.funnel
    assert funnel.read == funnel.valid + sum(funnel.reasons.values())
    assert len(found.prompts) == funnel.fit > 0
    assert len({p.id for p in found.prompts}) == funnel.fit
    assert all(0 < len(p.tokens) <= 60 for p in found.prompts)
    "\n".join(found.warnings).encode()


@settings(max_examples=ROWS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(rows, st.dictionaries(text, values, max_size=4)))
def test_any_row_is_a_question_or_says_why_not(fields: dict[str, Any]) -> None:
    found = question(Row(7, "a.jsonl:7", fields), Columns(), "a.jsonl")
    if isinstance(found, BadRow):
        assert found.where == "a.jsonl:7"
        assert found.reason
        (found.what + found.reason + (found.fix or "")).encode()
        return
    assert isinstance(found, Question)
    assert found.text.encode()
    assert found.answer.encode() or fields["answer"] == ""
    assert found.id
    assert set(found.metadata) == set(fields) - {"prompt", "answer", "id"}
