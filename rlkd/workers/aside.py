"""Questions to Ray that may not be answered for long: its head restarts, the network is gone."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def asked(question: Callable[[], Answer], name: str = "asks Ray") -> "Future[Answer]":
    """Its answer or error, from a thread of its own. A daemon: those of `asyncio.to_thread` are few, others need them,
    and they are waited for when the run ends, however long they hang."""
    answer: Future[Answer] = Future()
    answer.set_running_or_notify_cancel()  # who gives up waiting does not cancel it: it may be set later

    def work() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # of whatever kind: who waits must hear of it
            answer.set_exception(error)

    Thread(target=work, name=name, daemon=True).start()
    return answer


async def aside(question: Callable[[], Answer]) -> Answer:
    """What it gives, however long that takes."""
    return await asyncio.wrap_future(asked(question))


class OneAtATime:
    """Questions with a time limit, again and again. While one hangs no other is asked: threads would pile up."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last: Future[Any] | None = None

    async def __call__(self, question: Callable[[], Answer]) -> Answer:
        """What it gives; TimeoutError if that takes too long, or the last one has not been answered yet."""
        if self._last is not None and not self._last.done():
            raise TimeoutError("it has not answered the last question yet")
        self._last = answer = asked(question)
        async with asyncio.timeout(self._limit_s):
            return await asyncio.wrap_future(answer)
