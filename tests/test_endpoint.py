"""A teacher behind an API, against a server that misbehaves; and what it may cost."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkd.core.errors import BudgetReached, ConfigError, PreflightError, RlkdError, WorkerLost
from rlkd.core.ports import Writer, Written
from rlkd.core.types import Finish
from rlkd.engines import endpoint as module
from rlkd.engines.budget import Budget, Limits, Spent, most_tokens
from rlkd.engines.endpoint import Endpoint, EndpointOptions
from tests.fake_openai import KEY, FakeOpenAI, chat, drop, hang, raw, status

pytestmark = pytest.mark.stack  # a server that hangs and drops
ASK = [{"role": "user", "content": "2+2?"}]
Use = Callable[[Endpoint], Coroutine[Any, Any, Any]]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI().running() as running:
        yield running


def options(server: FakeOpenAI, **changes: Any) -> EndpointOptions:
    quick = EndpointOptions(server.url, "large", timeout_s=2.0, retries=3, backoff_s=0.01, max_tokens=50)
    return replace(quick, **changes)


def using(how: EndpointOptions, use: Use, budget: Budget | None = None, told: list[str] | None = None) -> Any:
    async def run() -> Any:
        made = Endpoint("teachers.big", how, budget, lambda _, text: (told if told is not None else []).append(text))
        try:
            return await use(made)
        finally:
            await made.close()

    return asyncio.run(run())


def write(made: Endpoint) -> Coroutine[Any, Any, Written]:
    return made.write(ASK, 7)


def test_what_is_sent_and_what_comes_back(server: FakeOpenAI) -> None:
    server.usual = chat("It is 4.", "length", (12, 5))
    how = options(server, system="Be brief.", temperature=0.5, top_p=0.9)
    written = using(how, lambda made: made.write(ASK, 2**40 + 7))
    assert written == Written("It is 4.", Finish.LENGTH, 5)
    (seen,) = server.seen
    assert seen.authorization is None
    assert seen.body == {
        "model": "large", "messages": [{"role": "system", "content": "Be brief."}, *ASK], "temperature": 0.5,
        "seed": 7, "max_tokens": 50, "top_p": 0.9,
    }  # fmt: skip
    assert isinstance(using(how, _itself), Writer)


async def _itself(made: Endpoint) -> Endpoint:
    return made


@pytest.mark.faults("F51")
@pytest.mark.parametrize(
    ("trouble", "requests"),
    [
        ([status(500), status(503, "loading")], 3),
        ([status(429, "slow down")], 2),
        ([drop], 2),
        ([raw("{}")], 2),
        ([raw('{"choices": [{"mess')], 2),
        ([raw('{"choices": []}')], 2),
        ([raw("[1, 2]")], 2),
        ([status(408), drop, raw("<html>")], 4),
    ],
)
def test_what_may_pass_is_asked_again(server: FakeOpenAI, trouble: list[Any], requests: int) -> None:
    server.script = list(trouble)
    assert using(options(server), write).text == "4"
    assert len(server.seen) == requests


@pytest.mark.faults("F51")
def test_a_hang_is_asked_again_after_the_timeout(server: FakeOpenAI) -> None:
    server.script = [hang]
    assert using(options(server, timeout_s=0.3), write).text == "4"
    assert len(server.seen) == 2


@pytest.mark.faults("F51")
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (status(500, "out of memory"), "HTTP 500: out of memory"),
        (drop, "the connection broke"),
        (raw("nonsense"), "its answer is no chat completion: 'nonsense'"),
    ],
)
def test_after_all_retries_the_worker_is_lost_and_nothing_made_up(server: FakeOpenAI, trouble: Any, said: str) -> None:
    server.usual = trouble
    with pytest.raises(WorkerLost, match=said) as caught:
        using(options(server), write)
    assert "4 attempts" in str(caught.value)
    assert "teachers.big" in str(caught.value)
    assert len(server.seen) == 4


@pytest.mark.faults("F51")
def test_retry_after_holds_every_request_back(server: FakeOpenAI) -> None:
    server.script = [status(429, Retry_After="0.6")]

    async def both(made: Endpoint) -> None:
        first = asyncio.create_task(made.write(ASK))
        await asyncio.sleep(0.2)
        await asyncio.gather(first, made.write(ASK))

    using(options(server, at_once=1), both)
    assert len(server.seen) == 3
    assert server.seen[1].at - server.seen[0].at >= 0.55


def test_without_retry_after_it_is_not_held_back(server: FakeOpenAI) -> None:
    """Negative control of the test above: it is the header that holds back, not the backoff."""
    server.script = [status(429)]
    using(options(server), write)
    assert server.seen[1].at - server.seen[0].at < 0.5


@pytest.mark.parametrize(("asked", "seconds"), [("2", 2.0), ("99999", 600.0), ("nonsense", 0.0), ("-3", 0.0)])
def test_how_long_it_is_held_back(server: FakeOpenAI, asked: str, seconds: float) -> None:
    async def held(made: Endpoint) -> float:
        made._hold_back({"retry-after": asked})
        return max(0.0, made._resume_at - time.monotonic())

    assert using(options(server), held) == pytest.approx(seconds, abs=0.2)


def test_retry_after_may_be_a_date(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(module.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return module.datetime(2026, 1, 1, 12, 0, 0, tzinfo=tz)

    monkeypatch.setattr(module, "datetime", Clock)

    async def held(made: Endpoint) -> float:
        made._hold_back({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"})
        return made._resume_at - time.monotonic()

    assert using(options(server), held) == pytest.approx(30, abs=0.5)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (status(403, "not yours"), "refuses: HTTP 403: not yours"),
        (status(400, "temperature must be 1"), "refuses: HTTP 400: temperature must be 1"),
        (status(402, "pay"), "the account behind the key is empty"),
        (status(429, "You exceeded your current quota", "insufficient_quota"), "the account behind the key is empty"),
        (status(302, "elsewhere"), "is the url right"),
    ],
)
def test_what_asking_again_cannot_mend_ends_at_once(server: FakeOpenAI, reply: Any, said: str) -> None:
    server.usual = reply
    with pytest.raises(RlkdError) as caught:
        using(options(server), write)
    assert said in str(caught.value)
    assert f"large at {server.url}" in str(caught.value)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("reply", "finish"),
    [
        (status(400, "This model's maximum context length is 4096 tokens. However, …"), Finish.LENGTH),
        (status(400, "…", "context_length_exceeded"), Finish.LENGTH),
        (status(400, "…", "content_filter"), Finish.ABORTED),
    ],
)
def test_messages_that_are_one_prompts_trouble(server: FakeOpenAI, reply: Any, finish: Finish) -> None:
    server.usual, told = reply, []
    assert using(options(server), write, told=told) == Written("", finish, 0)
    assert len(told) == 1


def test_newer_models_call_the_limit_otherwise(server: FakeOpenAI) -> None:
    server.script = [status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")]
    assert using(options(server), write).text == "4"
    assert "max_tokens" not in server.seen[1].body
    assert server.seen[1].body["max_completion_tokens"] == 50


def test_requests_keep_to_the_pace_and_to_at_once(server: FakeOpenAI) -> None:
    async def slow(request: Any) -> Any:
        await asyncio.sleep(0.1)
        return chat("4")(request)

    async def many(made: Endpoint) -> None:
        await asyncio.gather(*(made.write(ASK) for _ in range(6)))

    server.usual = slow
    using(options(server, at_once=2), many)
    assert server.most_at_once == 2
    server.seen.clear()
    using(options(server, requests_per_minute=1200.0), many)  # one every 50 ms
    apart = [b.at - a.at for a, b in zip(server.seen, server.seen[1:], strict=False)]
    assert sum(apart) >= 5 * 0.05 * 0.6  # at once they would be within a few hundredths of a second


# --- the self-test


def test_the_self_test_of_a_server_that_works(server: FakeOpenAI) -> None:
    assert using(options(server), lambda made: made.self_test()) == "4"
    assert len(server.seen) == 1


@pytest.mark.faults("F51")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "larg"}, "the server has: small, large"),
        ({"url": "http://127.0.0.1:9/v1"}, "cannot connect"),
        ({"url": "URL/nope"}, "HTTP 404"),
    ],
)
def test_the_self_test_says_what_is_wrong(server: FakeOpenAI, changes: dict[str, str], said: str) -> None:
    given = {key: value.replace("URL", server.url) for key, value in changes.items()}
    with pytest.raises(PreflightError) as caught:
        using(options(server, **given), lambda made: made.self_test())
    assert said in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("reply", "said"), [(chat(""), "gave an empty answer"), (chat(" ", "length"), "raise writer.max_tokens")]
)
def test_an_empty_answer_fails_the_self_test(server: FakeOpenAI, reply: Any, said: str) -> None:
    server.usual = reply
    with pytest.raises(PreflightError, match=said):
        using(options(server), lambda made: made.self_test())


def test_no_key_where_one_is_wanted(server: FakeOpenAI) -> None:
    server.key = KEY
    with pytest.raises(PreflightError, match="key_env"):
        using(options(server), lambda made: made.self_test())


@pytest.mark.parametrize(("value", "code"), [(None, "RLKD-C720"), (" ", "RLKD-C720"), ("a b", "RLKD-C721")])
def test_a_key_that_is_none(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, value: str | None, code: str) -> None:
    monkeypatch.delenv("BIG_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("BIG_KEY", value)
    with pytest.raises(ConfigError, match=r"BIG_KEY") as caught:
        using(options(server, key_env="BIG_KEY"), write)
    assert caught.value.problems[0].code == code
    assert "a b" not in str(caught.value)


def test_the_key_is_nowhere(
    server: FakeOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Not in what is logged at the noisiest level, reported, raised, shown by repr, or written to the account; though
    this server repeats it in its error, and junk holds it."""
    monkeypatch.setenv("BIG_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    server.key, told = KEY, []
    how = options(server, key_env="BIG_KEY", retries=1)
    budget = Budget("teachers.big", Limits(max_total_tokens=10_000), tmp_path / "account.json")
    found: list[str] = []

    async def use(made: Endpoint) -> None:
        assert (await made.write(ASK)).text == "4"
        server.script = [raw(f"{KEY} nonsense")] * 2
        for key in (KEY, "another", None):
            server.key = key
            with suppress(RlkdError, WorkerLost):
                await made.write(ASK)
        server.key = "another"
        try:
            await made.write(ASK)
        except RlkdError as error:
            found.extend([str(error), repr(error), repr(error.__context__), repr(error.__cause__)])
        found.extend([repr(made), repr(vars(made)), repr(made._client.headers), repr(made.options)])

    using(how, use, budget, told)
    assert server.seen[0].authorization == f"Bearer {KEY}"
    everything = [*found, *told, caplog.text, *capfd.readouterr(), (tmp_path / "account.json").read_text()]
    assert "Incorrect API key provided: Bearer <key>" in found[0]
    assert not [text for text in everything if KEY in text]


# --- the budget


def spent(path: Path) -> Spent:
    return Spent(**json.loads(path.read_text()))


def test_tokens_and_money_are_counted_over_attempts(server: FakeOpenAI, tmp_path: Path) -> None:
    server.usual, path = chat("4", usage=(100, 10)), tmp_path / "deep" / "big.json"
    limits = Limits(price_in=2.0, price_out=30.0)
    for attempt in (1, 2):
        using(options(server), write, Budget("teachers.big", limits, path))
        found = spent(path)
        assert replace(found, cost=0.0) == Spent(attempt, 100 * attempt, 10 * attempt)
        assert found.cost == pytest.approx(0.0005 * attempt)


@pytest.mark.faults("F51")
@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(max_total_tokens=300), r"of 300 tokens are spent \(max_total_tokens\)"),
        (Limits(max_cost=0.0035, price_in=10.0, price_out=20.0), r"of 0.0035 are spent \(max_cost\)"),
    ],
)
def test_the_budget_is_never_exceeded_and_then_reached(
    server: FakeOpenAI, tmp_path: Path, limits: Limits, said: str
) -> None:
    server.usual, path = chat("4", usage=(20, 40)), tmp_path / "big.json"
    budget = Budget("teachers.big", limits, path)

    async def many(made: Endpoint) -> list[Any]:
        return await asyncio.gather(*(made.write(ASK) for _ in range(20)), return_exceptions=True)

    results = using(options(server), many, budget)
    written = [r for r in results if isinstance(r, Written)]
    refused = [r for r in results if isinstance(r, BudgetReached)]
    assert len(written) + len(refused) == 20
    assert len(written) == len(server.seen) >= 3
    after = spent(path)
    assert after.tokens == 60 * len(written) <= 300
    assert limits.max_cost is None or after.cost <= limits.max_cost
    with pytest.raises(BudgetReached, match=said) as caught:  # the resumed run
        using(options(server), write, Budget("teachers.big", limits, path))
    assert caught.value.exit_code == 6
    assert len(server.seen) == len(written)


def test_without_counting_what_is_under_way_it_is_exceeded(
    server: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: look only at what is spent, and requests at once go over the budget together."""
    server.usual = chat("4", usage=(20, 40))
    budget = Budget("teachers.big", Limits(max_total_tokens=300), tmp_path / "big.json")
    worst = budget._worst
    monkeypatch.setattr(budget, "_worst", lambda now, bills: worst(now, bills[-1:]))

    async def many(made: Endpoint) -> None:
        await asyncio.gather(*(made.write(ASK) for _ in range(20)), return_exceptions=True)

    using(options(server), many, budget)
    assert budget.spent.tokens > 300


def test_what_is_not_said_is_counted_at_its_most_and_told_once(server: FakeOpenAI, tmp_path: Path) -> None:
    server.usual, told = chat("vier Ä", usage=None), []
    budget = Budget("teachers.big", Limits(max_total_tokens=10_000), tmp_path / "big.json", lambda _, t: told.append(t))

    async def twice(made: Endpoint) -> Written:
        await made.write(ASK)
        return await made.write(ASK)

    assert using(options(server), twice, budget).tokens is None
    most = most_tokens("2+2?") + module.PER_MESSAGE
    assert budget.spent == Spent(2, 2 * most, 2 * len("vier Ä".encode()), 0.0, 2)
    assert len(told) == 1


def test_refused_requests_cost_nothing_and_hanging_ones_the_most(server: FakeOpenAI, tmp_path: Path) -> None:
    budget = Budget("teachers.big", Limits(max_total_tokens=10_000), tmp_path / "big.json")
    server.script = [status(500), status(429)]
    using(options(server), write, budget)
    assert budget.spent == Spent(1, 7, 3, 0.0, 0)
    server.script = [hang]
    using(options(server, timeout_s=0.2), write, budget)
    most = most_tokens("2+2?") + module.PER_MESSAGE + 50
    assert (budget.spent.tokens, budget.spent.unknown) == (20 + most, 1)


def test_a_killed_program_has_counted_too_much_rather_than_too_little(server: FakeOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    budget = Budget("teachers.big", Limits(max_total_tokens=10_000), path)
    server.script = [hang]

    async def look(made: Endpoint) -> Spent:
        task = asyncio.create_task(made.write(ASK))
        while not server.seen:
            await asyncio.sleep(0.01)
        found = spent(path)  # what a program killed now leaves
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return found

    found = using(options(server), look, budget)
    assert found.tokens == most_tokens("2+2?") + module.PER_MESSAGE + 50
    assert spent(path) == found  # given up by its caller: it may have been worked on


def test_an_account_that_cannot_be_read_is_not_counted_from_zero(tmp_path: Path) -> None:
    (tmp_path / "big.json").write_text('{"requests": 3')
    with pytest.raises(PreflightError, match=r"RLKD-E721"):
        Budget("teachers.big", path=tmp_path / "big.json")
