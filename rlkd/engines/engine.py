"""What the engines that sample have in common: one thread owns the model and does everything that touches it.

Callers speak asyncio; what they ask for is put in a queue. The thread takes from it between two steps of the model, so
groups are added to a batch that is already running, and new weights go in while samples are half written. When the
thread ends by an error, everybody who waits gets that error at once, and so does everybody who comes later.
"""

import asyncio
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from rlkd.core.errors import PreflightError, RlkdError, WorkerLost
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.taken import port_taken
from rlkd.core.types import TopK
from rlkd.engines import weights
from rlkd.engines.jobs import EngineOptions, Job, Limits, Scoring, Writing, seed_of

log = logging.getLogger("rlkd.engines")


@dataclass(frozen=True)
class _Call:
    run: Callable[[], Any]
    future: "Future[Any]"
    fatal: bool = False  # what it leaves behind if it fails cannot be used any more


class Engine(ABC):
    """A model that samples and scores. `start` it before use; it begins as version 0, the weights at `options.path`."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.version, self.digest = 0, ""  # of the weights in use; the digest is known once some were loaded
        self.written = 0  # tokens written and sequences scored: grows while the engine gets anywhere
        self._jobs: dict[int, Job] = {}  # the thread's own: under way
        self._next_job = 0
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between the end of the thread and those who ask
        self._error: WorkerLost | None = None
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._started: Future[None] = Future()

    # --- what a model must bring; all of it runs on the thread

    @abstractmethod
    def _build(self) -> Limits:
        """Load the model."""

    @abstractmethod
    def _add(self, job: Job) -> None:
        """Take a Writing or Scoring up."""

    @abstractmethod
    def _step(self) -> None:
        """Go on by a token (or a whole Scoring); `self._finish` parts that are done."""

    @abstractmethod
    def _drop(self, job: Job) -> dict[int, Completion]:
        """Stop a job. Of a Writing: what was written of its unfinished parts, as ABORTED completions."""

    @abstractmethod
    def _load(self, ref: WeightRef) -> None:
        """Put weights in, forget what was computed with the old ones and could be reused. Not `self.version`."""

    @abstractmethod
    def _shutdown(self) -> None:
        """Release the model."""

    # --- what callers use

    @classmethod
    def create(cls, **options: Any) -> "Engine":
        """The engine with EngineOptions given by name: how workers make engines."""
        return cls(EngineOptions(**options))

    def start(self) -> None:
        """Load the model; returns when it can be used. PreflightError if it cannot be loaded, WorkerLost if another
        process took the port it was to use."""
        self.options.check()
        self._thread.start()
        self._started.result()

    async def generate(
        self, tokens: Int32[np.ndarray, "p"], n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        """`n` samples after the prompt. Sample k's randomness comes from (seed, k) alone: not from n, nor from what
        else is written at the time. Log-probs are those of the distribution after temperature, top_p and min_tokens
        (temperature 0: the likeliest token, log-probs of the distribution at temperature 1).

        DataError if the prompt or its answer does not fit; WorkerLost if the engine is or gets broken.
        """
        if sampling is None:
            raise ValueError("an engine has no default Sampling; the pool has")
        self._limits.check_sampling(tokens, n, sampling)
        seeds = [seed_of(seed, k) for k in range(n)]
        job = Writing(self._id(), n, tokens=tokens.tolist(), seeds=seeds, sampling=sampling)
        return await self._do(job)

    async def logp(self, sequences: Sequence[Int32[np.ndarray, "_"]]) -> list[Float32[np.ndarray, "_"]]:
        """log π(token | tokens before it) at temperature 1; NaN at the first token, which nothing predicts."""
        return [logp for logp, _ in await self._score(sequences, 0)]

    async def topk(self, sequences: Sequence[Int32[np.ndarray, "_"]], k: int) -> list[TopK]:
        """The k likeliest tokens at each place, likeliest first, at temperature 1; at the first token ids are 0 and
        log-probs NaN."""
        return [top for _, top in await self._score(sequences, k)]

    async def load(self, ref: WeightRef) -> str:
        """Use other weights from the next token on, also in samples half written; returns the digest of what was
        loaded. The bytes are checked before generation is interrupted. An engine that fails to load them is broken.
        """
        await asyncio.to_thread(weights.verify, ref)
        await self._ask(lambda: self._exchange(ref), fatal=True)
        return ref.digest

    async def abort(self) -> int:
        """End everything under way; each `generate` returns what it has, finish ABORTED. How many samples were cut."""
        cut: int = await self._ask(self._abort)
        return cut

    def status(self) -> tuple[int, str, int]:
        """(version, digest, samples and sequences under way). WorkerLost if the engine is broken."""
        if self._error is not None:
            raise WorkerLost(str(self._error))
        return self.version, self.digest, sum(j.count - len(j.results) for j in list(self._jobs.values()))

    def close(self, timeout_s: float = 30.0) -> None:
        """End the thread; who still waits gets WorkerLost."""
        self._calls.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # --- the caller's side

    def _id(self) -> int:
        self._next_job += 1
        return self._next_job

    async def _score(self, sequences: Sequence[Int32[np.ndarray, "_"]], k: int) -> list[tuple[Any, TopK]]:
        for tokens in sequences:
            self._limits.check_scoring(tokens)
        if not sequences:
            return []
        return await self._do(Scoring(self._id(), len(sequences), sequences=[s.tolist() for s in sequences], k=k))

    async def _do(self, job: Job) -> list[Any]:
        try:
            return await self._ask(lambda: self._begin(job), future=job.future)
        except asyncio.CancelledError:  # nobody waits any more: do not go on computing
            with suppress(WorkerLost):
                self._put(_Call(lambda: self._forget(job), Future()))
            raise

    async def _ask(self, run: Callable[[], Any], fatal: bool = False, future: "Future[Any] | None" = None) -> Any:
        """Have the thread call `run`. With `future` that is what is waited for, not the end of the call."""
        call = _Call(run, Future(), fatal)
        self._put(call)
        await asyncio.wrap_future(call.future)
        return await asyncio.wrap_future(future) if future is not None else call.future.result()

    def _put(self, call: _Call) -> None:
        with self._lock:
            if self._error is not None:
                raise WorkerLost(str(self._error))
            self._calls.put(call)

    # --- the thread's side

    def _begin(self, job: Job) -> None:
        if job.future.cancelled():
            return
        try:
            self._add(job)
        except Exception:
            self._drop(job)
            raise
        self._jobs[job.id] = job

    def _finish(self, job: Job, part: int, result: Any) -> None:
        self.written += isinstance(job, Scoring)
        if job.finish(part, result):
            self._jobs.pop(job.id, None)

    def _forget(self, job: Job) -> None:
        if self._jobs.pop(job.id, None) is not None:
            self._drop(job)

    def _abort(self) -> int:
        cut = 0
        for job in [j for j in self._jobs.values() if isinstance(j, Writing)]:
            for part, partial in self._drop(job).items():
                self._finish(job, part, partial)
                cut += 1
        return cut

    def _exchange(self, ref: WeightRef) -> None:
        self._load(ref)
        self.version, self.digest = ref.version, ref.digest

    def _run(self) -> None:
        try:
            self._limits = self._build()
        except BaseException as error:
            self._started.set_exception(_unstartable(self.options.path, error))
            return
        self._started.set_result(None)
        try:
            while self._serve():
                pass
            self._end(WorkerLost(f"{type(self).__name__} was closed"))
        except BaseException as error:
            log.exception("the engine stopped")
            self._end(WorkerLost(f"{type(self).__name__} stopped: {type(error).__name__}: {error}"))
        finally:
            self._shutdown()

    def _serve(self) -> bool:
        """Do what was asked since the last step, or wait for something to do; then one step. False when closed."""
        while True:
            try:
                call = self._calls.get(block=not self._jobs)
            except queue.Empty:
                break
            if call is None:
                return False
            self._answer(call)
        self._step()
        return True

    def _answer(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel() and not call.fatal:
            return
        try:
            result = call.run()
        except BaseException as error:
            if not call.future.cancelled():
                call.future.set_exception(error)
            if call.fatal or not isinstance(error, Exception):
                raise
            return
        if not call.future.cancelled():
            call.future.set_result(result)

    def _end(self, error: WorkerLost) -> None:
        with self._lock:
            self._error = error
        waiting: list[Future[Any]] = [job.future for job in self._jobs.values()]
        self._jobs.clear()
        with suppress(queue.Empty):
            while True:
                call = self._calls.get_nowait()
                waiting += [call.future] if call is not None else []
        for future in waiting:
            with suppress(InvalidStateError):
                future.set_exception(error)


def _unstartable(path: str, error: BaseException) -> BaseException:
    if isinstance(error, RlkdError) or not isinstance(error, Exception):
        return error
    log.error("the engine could not be started", exc_info=error)
    if port_taken(error) or type(error).__name__ == "DistNetworkError":  # of torch
        return WorkerLost(f"the engine found no port of its own: {type(error).__name__}: {error}")  # another one may
    said = " ".join(str(error).split())[:500]
    fix = "`rlkd doctor` and `rlkd check` look for what is missing; the worker's log has the traceback"
    if "cache" in said.lower():  # vLLM's words for too little room for keys and values
        fix = "raise sampler.kv_cache_gib (on GPU sampler.gpu_memory_utilization), or lower model.context"
    problem = PreflightError(
        "RLKD-E601", f"the model cannot be loaded: {type(error).__name__}: {said}", where=path, fix=fix
    )
    problem.__cause__ = error
    return problem
