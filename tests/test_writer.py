"""A local teacher that writes, and the wrapper that says what cannot be known of one that scores."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rlkd.core.errors import DataError, NoWorkers, WorkerLost
from rlkd.core.ports import Completion, Model, Sampling, Writer, Written
from rlkd.core.types import Finish, TopK
from rlkd.data import HFTokenizer
from rlkd.workers.teacher import Dispensable, Teacher
from rlkd.workers.writer import LocalWriter
from tests.small_tokenizers import byte_tokenizer, wrapped

ASK = [{"role": "user", "content": "2+2?"}]


@dataclass
class Scripted:
    """A model that writes a given text, and whose log-prob of a token is −its id − 1."""

    tokenizer: HFTokenizer = field(default_factory=wrapped)
    text: str = "It is 4."
    finish: Finish = Finish.STOP
    asked: list[Any] = field(default_factory=list)

    async def generate(
        self, tokens: np.ndarray, n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        self.asked.append((self.tokenizer.decode(tokens, special=True), n, seed, sampling))
        ids = np.append(self.tokenizer.spans(self.text)[0], self.tokenizer.eos).astype(np.int32)
        return [Completion(ids, np.zeros(len(ids), np.float32), self.finish, (0, 0))]

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.asked.append([len(s) for s in sequences])
        return [np.concatenate([[np.nan], -s[1:] - 1.0]).astype(np.float32) for s in sequences]

    async def topk(self, sequences: Sequence[np.ndarray], k: int) -> list[TopK]:
        self.asked.append([len(s) for s in sequences])
        ids = [np.stack([s + j for j in range(k)], 1).astype(np.int32) for s in sequences]
        return [TopK(i, -i.astype(np.float32) - 1) for i in ids]


SAMPLING = Sampling(max_tokens=20, temperature=0.7, stop_tokens=(2,))


def writer(model: Scripted, **changes: Any) -> LocalWriter:
    settings: dict[str, Any] = {"context": 200, **changes}
    return LocalWriter("teachers.big", model, model.tokenizer, SAMPLING, **settings)


def test_the_teachers_own_template_and_words() -> None:
    model = Scripted()
    made = writer(model)
    assert isinstance(made, Writer)
    assert asyncio.run(made.write(ASK, 5)) == Written("It is 4.", Finish.STOP, 9)
    assert model.asked == [("<s>user:2+2?<turn>assistant:", 1, 5, SAMPLING)]


def test_a_system_message_where_a_call_brings_none() -> None:
    model = Scripted()
    made = writer(model, system="Teach.")
    asyncio.run(made.write(ASK))
    asyncio.run(made.write([{"role": "system", "content": "Own."}, *ASK]))
    assert [a[0] for a in model.asked] == [
        "<s>system:Teach.<turn>user:2+2?<turn>assistant:",
        "<s>system:Own.<turn>user:2+2?<turn>assistant:",
    ]


def test_without_a_template_the_contents_follow_one_another() -> None:
    model = Scripted()
    asyncio.run(writer(model, chat=False, system="Teach.").write(ASK))
    assert model.asked[0][0] == "<s>Teach.\n\n2+2?"


def test_messages_that_do_not_fit_are_reported_and_not_fatal() -> None:
    model, told = Scripted(), []
    made = writer(model, context=27, report=lambda kind, text: told.append((kind, text)))
    assert asyncio.run(made.write([{"role": "user", "content": "x" * 40}])) == Written("", Finish.LENGTH, 0)
    assert model.asked == []
    assert told == [("teacher", "teachers.big: messages of 57 tokens leave no room in 27")]


def test_a_text_ends_where_the_context_does() -> None:
    model = Scripted(finish=Finish.LENGTH)
    written = asyncio.run(writer(model, context=27).write(ASK))
    assert written.finish is Finish.LENGTH
    prompt = len(model.tokenizer.chat(ASK))
    assert model.asked[0][3].max_tokens == 27 - prompt < 20


def test_an_aborted_text_is_a_lost_worker() -> None:
    with pytest.raises(WorkerLost):
        asyncio.run(writer(Scripted(finish=Finish.ABORTED)).write(ASK))


def test_a_template_that_refuses_is_one_clear_error() -> None:
    refusing = "{{ raise_exception('system role not supported') }}"
    model = Scripted(HFTokenizer(byte_tokenizer(refusing)))
    with pytest.raises(DataError, match=r"teachers.big: its chat template does not take messages of user: system role"):
        asyncio.run(writer(model).write(ASK))


# --- a teacher that scores


def teacher(told: list[str] | None = None, **changes: Any) -> Teacher:
    settings: dict[str, Any] = {"context": 100, "vocabulary": 50, "known_ids": 50, **changes}
    kept = told if told is not None else []
    return Teacher("teachers.big", Scripted(), report=lambda _, text: kept.append(text), **settings)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_where_all_is_known_nothing_is_changed() -> None:
    told: list[str] = []
    made = teacher(told)
    assert isinstance(made, Model)
    (logp,) = asyncio.run(made.logp([ids(3, 4, 5, 2)]))
    np.testing.assert_array_equal(logp, [np.nan, -5, -6, -3])
    (top,) = asyncio.run(made.topk([ids(3, 4)], 2))
    np.testing.assert_array_equal(top.ids, [[3, 4], [4, 5]])
    np.testing.assert_array_equal(top.logp, [[-4, -5], [-5, -6]])
    assert told == []


def test_an_end_token_that_is_not_the_teachers_is_not_known() -> None:
    (logp,) = asyncio.run(teacher(foreign_ends=(2,)).logp([ids(3, 4, 2)]))
    np.testing.assert_array_equal(logp, [np.nan, -5, np.nan])
    (top,) = asyncio.run(teacher(foreign_ends=(2,)).topk([ids(3, 4, 2)], 1))
    np.testing.assert_array_equal(top.logp[:, 0], [-4, -5, np.nan])


def test_what_does_not_fit_is_not_known_and_told_seldom() -> None:
    told: list[str] = []
    made = teacher(told, context=2)
    for _ in range(5):
        long, short = asyncio.run(made.logp([ids(3, 4, 5, 2), ids(3, 4)]))
    np.testing.assert_array_equal(long, [np.nan, -5, np.nan, np.nan])
    np.testing.assert_array_equal(short, [np.nan, -5])
    assert made.model.asked[-1] == [2, 2]  # type: ignore[attr-defined]
    assert made.unread == 5
    assert [t.split(". ")[-1] for t in told] == [f"{n} sequences so far" for n in (1, 2, 4)]
    assert "reads 2 of 4 tokens (its context of 2)" in told[0]


def test_from_a_token_on_that_it_lacks_nothing_is_known() -> None:
    told: list[str] = []
    made = teacher(told, vocabulary=5)
    first, second = asyncio.run(made.logp([ids(3, 4, 5, 2), ids(9, 1)]))
    np.testing.assert_array_equal(first, [np.nan, -5, np.nan, np.nan])
    assert np.isnan(second).all()
    assert made.model.asked == [[2]]  # type: ignore[attr-defined]
    assert "a token that it lacks" in told[0]
    assert np.isnan(asyncio.run(made.logp([ids(9, 1)]))[0]).all()  # nobody is asked for nothing
    assert made.model.asked == [[2]]  # type: ignore[attr-defined]


def test_likeliest_tokens_that_the_policy_lacks() -> None:
    (top,) = asyncio.run(teacher(known_ids=5).topk([ids(3, 4)], 2))
    np.testing.assert_array_equal(top.ids, [[3, 4], [0, 0]])
    np.testing.assert_array_equal(top.logp, [[-4, -5], [np.nan, np.nan]])


# --- a teacher that may be away


@dataclass
class Away(Scripted):
    """Raises what it is told to, instead of an answer."""

    losses: list[Exception | None] = field(default_factory=list)

    async def logp(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        if (lost := self.losses.pop(0)) is not None:
            raise lost
        return await super().logp(sequences)

    async def topk(self, sequences: Sequence[np.ndarray], k: int) -> list[TopK]:
        if (lost := self.losses.pop(0)) is not None:
            raise lost
        return await super().topk(sequences, k)


@pytest.mark.faults("F7")
def test_without_a_worker_its_log_probs_are_unknown_and_counted() -> None:
    told: list[str] = []
    gone = NoWorkers("RLKD-I611", "teacher:big-0 is out", where="teacher:big", fix="")
    model = Away(losses=[None, WorkerLost("teacher:big-0 died"), gone, None])
    spare = Dispensable("teachers.big", model, lambda _, text: told.append(text))
    made = Teacher("teachers.big", spare, 100, 50, 50)
    assert isinstance(spare, Model)
    asks = [ids(3, 4), ids(5, 6)]
    known, lost = asyncio.run(made.logp(asks)), asyncio.run(made.logp(asks))
    np.testing.assert_array_equal(known[0], [np.nan, -5])
    assert [len(row) for row in lost] == [2, 2]
    assert np.isnan(np.concatenate(lost)).all()
    top = asyncio.run(made.topk(asks, 3))
    assert [t.ids.shape for t in top] == [(2, 3), (2, 3)]
    assert all(np.isnan(t.logp).all() for t in top)
    assert not np.isnan(asyncio.run(made.topk(asks, 3))[0].logp).any()
    assert (spare.asked, spare.skipped) == (8, 4)
    assert "2 of 4 sequences so far (50%). teacher:big-0 died" in told[0]
    assert "4 of 6 sequences so far (67%)" in told[1]


def test_other_errors_of_a_teacher_that_may_be_away_are_errors() -> None:
    spare = Dispensable("teachers.big", Away(losses=[DataError("RLKD-D1", "wrong")]))
    with pytest.raises(DataError, match="wrong"):
        asyncio.run(spare.logp([ids(3, 4)]))
