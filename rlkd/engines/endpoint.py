"""A teacher behind an OpenAI-compatible API (`/chat/completions`): it writes, and cannot score.

What may go wrong, and what then happens:

    429, 5xx, dropped, timeout, junk    asked again, with backoff and jitter; Retry-After holds all requests back
    still, after all retries            WorkerLost: the loop asks for the stage again, nothing is made up
    401, 403, 404, other 4xx            RlkdError that says what the server said: asking again cannot help
    messages too long for its model     an empty text with finish LENGTH, reported; so is one refused by a filter
    budget reached                      BudgetReached, before the request is sent

The API key comes from the environment, is only ever put into a request's header, and taken out of whatever the server
says before it is shown.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from aiolimiter import AsyncLimiter
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from rlkd.core.errors import PreflightError, RlkdError, WorkerLost
from rlkd.core.ports import Written
from rlkd.core.types import Finish
from rlkd.engines.api_key import ApiKey
from rlkd.engines.budget import Bill, Budget, most_tokens

Message = Mapping[str, str]
AGAIN = {408, 409, 425, 429}  # and every 5xx
LONGEST_WAIT_S = 60.0  # between two attempts of one request
LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is asked again then
PER_MESSAGE = 16  # tokens a chat template puts around a message, at most
FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}
TOO_LONG = ("context_length_exceeded", "context length", "context window", "maximum context", "too many tokens")
FILTERED = ("content_filter", "content_policy_violation", "content management policy")


@dataclass(frozen=True)
class EndpointOptions:
    """How an endpoint is asked; names as in the recipe's `teachers.NAME.endpoint` and `.writer`."""

    url: str  # up to and with /v1
    model: str
    key_env: str | None = None
    requests_per_minute: float | None = None
    at_once: int = 16
    retries: int = 5
    timeout_s: float = 120.0
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    system: str | None = None
    backoff_s: float = 1.0  # before the first retry; doubles, up to LONGEST_WAIT_S


class _Again(Exception):
    """Asking again may help."""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes


class Endpoint:
    """The port `Writer`. `name` is how messages call it. Use it from one event loop, and close it."""

    def __init__(
        self,
        name: str,
        options: EndpointOptions,
        budget: Budget | None = None,
        report: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        """ConfigError if the environment has no usable key where there should be one."""
        self.name, self.options, self.budget, self._report = name, options, budget or Budget(name), report
        self._key = ApiKey.of(name, options.key_env)
        self._client = httpx.AsyncClient(auth=self._key, timeout=None, limits=httpx.Limits(max_connections=None))
        self._free = asyncio.Semaphore(options.at_once)
        per_minute = options.requests_per_minute  # one after the other, not a minute's worth at once
        self._pace = AsyncLimiter(1, 60 / per_minute) if per_minute else None
        self._resume_at = 0.0  # monotonic seconds; until then the server wants to be left alone
        self._limit_key = "max_tokens"
        self.counts = {"requests": 0, "asked_again": 0}

    async def close(self) -> None:
        await self._client.aclose()

    async def write(self, messages: Sequence[Message], seed: int = 0) -> Written:
        """A text after the messages. WorkerLost after all retries; RlkdError for what asking again cannot mend."""
        return await self._written(messages, seed, self.options.retries)

    async def self_test(self) -> str:
        """One small request, so that mistakes show before anything is started; what it answered."""
        self.budget.check()
        ask = [{"role": "user", "content": "Answer with the word yes."}]
        try:
            written = await self._written(ask, 0, min(2, self.options.retries))
        except WorkerLost as lost:
            raise self._problem(
                "RLKD-E711", f"cannot be used: {lost}", "is it running, and is the url right, up to and with /v1?"
            ) from lost
        if not written.text.strip():
            cut = written.finish is Finish.LENGTH
            fix = "raise writer.max_tokens: it came to no text within them" if cut else "try the model by hand"
            raise self._problem("RLKD-E712", "gave an empty answer to a question", fix)
        return written.text

    # --- one text

    async def _written(self, messages: Sequence[Message], seed: int, retries: int) -> Written:
        said = [dict(m) for m in messages]
        if self.options.system is not None and not any(m["role"] == "system" for m in said):
            said.insert(0, {"role": "system", "content": self.options.system})
        again = AsyncRetrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(retries + 1),
            wait=wait_exponential_jitter(self.options.backoff_s, LONGEST_WAIT_S, jitter=self.options.backoff_s),
            reraise=True,
        )
        try:
            async for attempt in again:
                with attempt:
                    self.counts["asked_again"] += attempt.retry_state.attempt_number > 1
                    return await self._attempt(said, seed)
        except _Again as last:
            tries = f"{retries + 1} attempts" if retries else "1 attempt"
            raise WorkerLost(f"{self.name} at {self.options.url}: {last} ({tries})") from None
        raise AssertionError("not reached")

    async def _attempt(self, messages: list[dict[str, str]], seed: int) -> Written:
        async with self._free:
            while (pause := self._resume_at - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if self._pace is not None:
                await self._pace.acquire()
            most = sum(most_tokens(m["content"]) + PER_MESSAGE for m in messages)
            async with self.budget.request(most, self.options.max_tokens) as bill:
                self.counts["requests"] += 1
                answer = await self._send("POST", "chat/completions", bill, self._body(messages, seed))
                if answer.status == 200:
                    return self._read(answer, bill)
                bill.free()
        return await self._refused(answer, messages, seed)

    def _body(self, messages: list[dict[str, str]], seed: int) -> dict[str, Any]:
        o = self.options
        body = {"model": o.model, "messages": messages, "temperature": o.temperature, "seed": seed % 2**31}
        body[self._limit_key] = o.max_tokens
        return body | ({"top_p": o.top_p} if o.top_p < 1 else {})

    async def _send(self, method: str, path: str, bill: Bill, body: Any = None) -> _Answer:
        """The whole answer within the time; _Again for everything that happens on the way."""
        url = f"{self.options.url.rstrip('/')}/{path}"
        try:
            async with asyncio.timeout(self.options.timeout_s):
                response = await self._client.request(method, url, json=body)
        except TimeoutError:
            raise _Again(f"no answer within {self.options.timeout_s:g} s") from None
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            bill.free()
            raise _Again(f"cannot connect: {self._shown(str(error)) or type(error).__name__}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Again(f"the connection broke: {self._shown(str(error)) or type(error).__name__}") from None
        return _Answer(response.status_code, response.headers, response.content)

    def _read(self, answer: _Answer, bill: Bill) -> Written:
        """The text of a chat completion; _Again if it is none."""
        try:
            content = json.loads(answer.content)
            choice = content["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):  # a list of parts
                text = "".join(part.get("text", "") for part in text)
            usage = content.get("usage") or {}
            tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            start = self._shown(answer.content[:100].decode("utf-8", "replace"))
            raise _Again(f"its answer is no chat completion: {start!r}") from None
        if isinstance(tokens_in, int) and isinstance(tokens_out, int):
            bill.paid(tokens_in, tokens_out)
        else:  # never more than max_tokens, and seldom as many as bytes
            tokens_out, bill.most_out = None, min(bill.most_out, most_tokens(text))
        finish = FINISH.get(str(choice.get("finish_reason")), Finish.ABORTED)
        return Written(text, finish, tokens_out)

    # --- when it does not

    async def _refused(self, answer: _Answer, messages: list[dict[str, str]], seed: int) -> Written:
        """Not 200. _Again where that may help, an empty text where only these messages are the trouble, else
        RlkdError."""
        code, said = _error_of(answer.content)
        said = self._shown(said)
        text = f"{code} {said}".lower()
        if (answer.status in AGAIN or answer.status >= 500) and "insufficient_quota" not in text:
            self._hold_back(answer.headers)
            raise _Again(f"HTTP {answer.status}: {said}")
        if answer.status in (400, 413, 422):
            if "max_completion_tokens" in text and self._limit_key == "max_tokens":
                self._limit_key = "max_completion_tokens"  # what newer models call it, and insist on
                return await self._attempt(messages, seed)
            if any(words in text for words in TOO_LONG):
                self._report("teacher", f"{self.name}: messages too long for {self.options.model}: {said}")
                return Written("", Finish.LENGTH, 0)
            if any(words in text for words in FILTERED):
                self._report("teacher", f"{self.name}: {self.options.model} refuses to answer: {said}")
                return Written("", Finish.ABORTED, 0)
        raise await self._fatal(answer.status, said)

    def _hold_back(self, headers: Mapping[str, str]) -> None:
        """Retry-After, seconds or a date, is for every request."""
        asked = headers.get("retry-after")
        if asked is None:
            return
        seconds = 0.0
        with suppress(ValueError, TypeError):
            seconds = float(asked)
        if not seconds:
            with suppress(ValueError, TypeError):
                seconds = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
        if seconds > 0:
            self._resume_at = max(self._resume_at, time.monotonic() + min(seconds, LONGEST_RETRY_AFTER_S))

    async def _fatal(self, status: int, said: str) -> RlkdError:
        o = self.options
        if status in (401, 403):
            fix = f"is the key in the environment variable {o.key_env} right, and for this model?"
            if o.key_env is None:
                fix = f"it wants a key: name the environment variable that holds it in {self.name}.endpoint.key_env"
        elif status in (400, 404, 422):
            has = await self._models()
            fix = f"the server has: {', '.join(has)}" if has else "is the url right, up to and with /v1, and the model?"
            if has and o.model in has:
                fix = f"see {self.name}.endpoint and {self.name}.writer for what is asked of it"
        elif status in (402, 429):
            fix = "the account behind the key is empty"
        else:
            fix = "is the url right, up to and with /v1?"
        return self._problem("RLKD-E710", f"refuses: HTTP {status}: {said}", fix)

    async def _models(self) -> list[str]:
        """The names the server gives under /models; none if it does not say."""
        try:
            answer = await self._send("GET", "models", Bill(0, 0))
            names = [str(model["id"]) for model in json.loads(answer.content)["data"]]
        except (_Again, ValueError, LookupError, TypeError):
            return []
        return [self._shown(name) for name in names[:12]] + (["…"] if len(names) > 12 else [])

    def _problem(self, code: str, what: str, fix: str) -> PreflightError:
        o = self.options
        return PreflightError(code, f"{self.name} ({o.model} at {o.url}) {what}", f"{self.name}.endpoint", fix)

    def _shown(self, text: str) -> str:
        """What a server says, on one line, without the key that it may have repeated."""
        return " ".join(self._key.without(text).split())[:300]


def _error_of(content: bytes) -> tuple[str, str]:
    """(code, message) of an error in OpenAI's form or one like it; else the text itself."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        found = json.loads(content)
        error = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
        if isinstance(error, dict):
            return str(error.get("code") or error.get("type") or ""), str(error.get("message") or error)
        return "", str(error)
    except ValueError:
        return "", text
