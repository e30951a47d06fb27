"""A job's log, line by line until the job is over. The dashboard may be away in between: the job does not notice."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rlkd.core.errors import InfrastructureError
from rlkd.submit.ending import MARK, Ending, ending
from rlkd.submit.jobs import Job, Jobs, NoSuchJob, Unanswered

LOOK_S = 10.0  # nothing new in the log for so long: is the job over?
AGAIN_S, LONGEST_S = 2.0, 30.0  # between two tries to reach the dashboard: doubled so often at most
DOUBLED = 6
KEPT = 400  # lines at the end, for ending()
LAST_TRIES = 5  # to read the log of a job that is over: its last line says whether it saved, and is to go on
Say = Callable[[str], None]


@dataclass
class Follower:
    """`write` gets the job's lines, `say` what there is to say of the connection. `seen`: characters of the log that
    need not be written again. `until`: monotonic time at which it gives up, None: never."""

    jobs: Jobs
    job_id: str
    write: Say
    say: Say
    patience_s: float = 600.0  # without the dashboard
    until: float | None = None
    seen: int = 0
    look_s: float = LOOK_S
    again_s: float = AGAIN_S
    _rest: str = field(default="", init=False)  # a line that is not whole yet
    _last: "deque[str]" = field(default_factory=lambda: deque(maxlen=KEPT), init=False)
    _deaf_since: float | None = field(default=None, init=False)
    _cut: bool = field(default=False, init=False)  # the log's connection alone is lost, and that was said

    def run(self) -> Job | None:
        """The job, when it is over; None if it is not, by `until`. InfrastructureError if the dashboard is away for too
        long, or the cluster does not know the job any more. KeyboardInterrupt passes: the job goes on."""
        return asyncio.run(self._run())

    def ending(self, job: Job) -> Ending:
        """How the job that was followed ended."""
        return ending(job, "\n".join([*self._last, self._rest]))

    async def _run(self) -> Job | None:
        idle = 0  # rounds in a row that brought nothing, or only by asking for the whole log
        while True:
            before, broken = self.seen, await self._tailed()
            try:
                job = self.jobs.get(self.job_id)
                self._heard()
                read, tries = self._catch_up(), LAST_TRIES
                while job.over and not read and (tries := tries - 1):
                    await asyncio.sleep(self.again_s)
                    read = self._catch_up()
                if job.over:
                    self._flush()
                    return job
                self._is_cut(broken)
            except NoSuchJob as error:
                raise self._forgotten() from error
            except Exception as error:  # the connection's errors are of many libraries: requests, Ray
                self._hiccup(error)
            if self._late():
                return None
            idle = 0 if self.seen > before and broken is None else idle + 1
            pause = min(LONGEST_S, self.again_s * 2 ** min(idle, DOUBLED))
            await asyncio.sleep(min(pause, self._wait_s()) if broken is not None or self.until is not None else pause)

    async def _tailed(self) -> Exception | None:
        """_tail, and what broke it: that its connection fails does not mean that the dashboard does not answer."""
        try:
            await self._tail()
        except Exception as error:  # of many libraries: websocket, requests, Ray
            return error
        return None

    async def _tail(self) -> None:
        """Write what is new, until the log ends, the job is over, or the connection is lost."""
        log, skip = self.jobs.tail(self.job_id), self.seen
        pending: asyncio.Future[str] | None = None
        try:
            while not self._late():
                pending = pending or asyncio.ensure_future(anext(log))
                done, _ = await asyncio.wait({pending}, timeout=self._wait_s())
                if not done:
                    if self.jobs.get(self.job_id).over:
                        return
                    self._heard()
                    continue
                text, pending = pending.result(), None
                self._heard()
                new, skip = text[skip:], max(0, skip - len(text))
                self.seen += len(new)
                self._take(new)
        except StopAsyncIteration:
            return
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await pending
            with suppress(Exception):
                await log.aclose()  # type: ignore[attr-defined]

    def _catch_up(self) -> bool:
        """What the connection did not bring: it may end as if all were said though the job goes on (ray#60665), and a
        very long line ends it each time (ray#63364). False if the log cannot be read now."""
        try:
            new = self.jobs.log(self.job_id)[self.seen :]
        except Unanswered:
            return False
        self.seen += len(new)
        self._take(new)
        return True

    def _wait_s(self) -> float:
        return self.look_s if self.until is None else max(0.1, min(self.look_s, self.until - time.monotonic()))

    def _late(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until

    def _take(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._last.append(line)
            if not line.startswith(MARK):
                self.write(line)

    def _flush(self) -> None:
        if self._rest:
            self._take("\n")

    def _heard(self) -> None:
        if self._deaf_since is not None:
            self.say(f"the dashboard answers again, after {time.monotonic() - self._deaf_since:.0f} s")
        self._deaf_since = None

    def _is_cut(self, error: Exception | None) -> None:
        """A proxy or a load balancer may let through every question, and not the log's connection."""
        if error is not None and not self._cut:
            self.say(f"the log's own connection fails ({_words(error)}): the log is asked for now and then instead")
        self._cut = error is not None

    def _hiccup(self, error: Exception) -> None:
        now = time.monotonic()
        if self._deaf_since is None:
            self._deaf_since = now
            self.say(
                f"the dashboard does not answer ({_words(error)}): the job goes on; "
                f"asked again for {self.patience_s:.0f} s"
            )
        if now - self._deaf_since > self.patience_s:
            raise InfrastructureError(
                "RLKD-I230",
                f"the dashboard did not answer for {self.patience_s:.0f} s; nobody knows how {self.job_id} is",
                where=self.jobs.address,
                fix="the same rlkd submit command follows the job again when the cluster can be reached",
            ) from error

    def _forgotten(self) -> InfrastructureError:
        return InfrastructureError(
            "RLKD-I231",
            f"the cluster does not know {self.job_id} any more: its head was started anew",
            where=self.jobs.address,
            fix="the same rlkd submit command goes on from the last checkpoint",
        )


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def ended(jobs: Jobs, job: Job) -> Ending:
    """How a job ended that nobody followed; of one that is not over, nothing is known."""
    with suppress(Unanswered, NoSuchJob):
        return ending(job, jobs.log(job.id))
    return ending(job, "")
