"""Questions to Ray that may not be answered for long: its head restarts, the network is gone."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")


async def aside(question: Callable[[], Answer]) -> Answer:
    """What it gives, from a thread of its own. A daemon: those of `asyncio.to_thread` are few, others need them, and
    they are waited for when the run ends, however long they hang."""
    answer: Future[Answer] = Future()
    answer.set_running_or_notify_cancel()  # who gives up waiting does not cancel it: it may be set later

    def work() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=work, name="asks Ray", daemon=True).start()
    return await asyncio.wrap_future(answer)
