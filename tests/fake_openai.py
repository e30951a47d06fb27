"""An OpenAI-compatible server on this machine that misbehaves as a script says."""
# ruff: noqa: ARG001, ARG005 – replies are functions of a request, whether they look at it or not

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = "sk-CANARY-7f3a"
Reply = Callable[[web.Request], Any]


def chat(text: str, finish: str = "stop", usage: tuple[int, int] | None = (7, 3)) -> Reply:
    """A right answer; `usage` None: it does not say how many tokens it used."""

    def reply(request: web.Request) -> web.Response:
        content: dict[str, Any] = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
        if usage is not None:
            content["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        return web.json_response(content)

    return reply


def status(code: int, message: str = "no", kind: str = "", **headers: str) -> Reply:
    def reply(request: web.Request) -> web.Response:
        headed = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response({"error": {"message": message, "code": kind}}, status=code, headers=headed)

    return reply


def raw(text: str) -> Reply:
    return lambda request: web.Response(text=text)


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    raise AssertionError


def drop(request: web.Request) -> web.Response:
    """The connection is closed in the middle of the answer's place."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


@dataclass
class Seen:
    at: float  # monotonic seconds
    body: dict[str, Any]
    authorization: str | None


@dataclass
class FakeOpenAI:
    """`script` is what the next requests get, in their order; afterwards `usual`."""

    script: list[Reply] = field(default_factory=list)
    usual: Reply = field(default_factory=lambda: chat("4"))
    models: list[str] = field(default_factory=lambda: ["small", "large"])
    key: str | None = None  # wanted
    seen: list[Seen] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.seen.append(Seen(time.monotonic(), body, request.headers.get("Authorization")))
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            told = request.headers.get("Authorization", "none")  # as some servers do, it repeats the key
            return web.json_response({"error": {"message": f"Incorrect API key provided: {told}"}}, status=401)
        if body["model"] not in self.models:
            return web.json_response({"error": {"message": f"The model `{body['model']}` does not exist"}}, status=404)
        reply = self.script.pop(0) if self.script else self.usual
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            answer = reply(request)
            return await answer if asyncio.iscoroutine(answer) else answer
        finally:
            self._now -= 1

    async def listed(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    @contextmanager
    def running(self) -> Iterator["FakeOpenAI"]:
        """Serves in a thread of its own."""
        self._now = 0
        loop, ready = asyncio.new_event_loop(), threading.Event()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/v1/models", self.listed)
        runner = web.AppRunner(app, shutdown_timeout=0.1)

        async def start() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            ready.set()

        def serve() -> None:
            loop.run_until_complete(start())
            loop.run_forever()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
