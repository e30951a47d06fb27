"""`rlkd status`, `rlkd logs` and `rlkd stop`: of runs on a Ray cluster, whoever submitted them."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlkd.core.errors import INTERRUPTED, OK, InfrastructureError
from rlkd.submit.client import who
from rlkd.submit.ending import MARK, Ending
from rlkd.submit.follow import Follower, ended
from rlkd.submit.jobs import RAYS_WAIT_S, Job, Jobs, NoSuchJob, Unanswered, clock

SHOWN = 5  # attempts of a run, the newest
AFTER_KILL_S = 30.0  # Ray has killed the job then, and says so
Say = Callable[[str], None]


def status(jobs: Jobs, name: str | None) -> dict[str, Any]:
    """Of one run, or of every run there is."""
    if name is not None:
        return _one(jobs, name)
    runs = [_one(jobs, n, shown=1) for n in jobs.runs()]
    text = "\n".join(run["text"] for run in runs) or f"no run was submitted to {jobs.address}"
    return {"runs": [{k: v for k, v in run.items() if k != "text"} for run in runs], "text": text}


def _one(jobs: Jobs, name: str, shown: int = SHOWN) -> dict[str, Any]:
    found = jobs.known(name)
    rows, lines = [], [f"{name} at {jobs.address}"]
    for job in found[-shown:]:
        end = ended(jobs, job) if job.over else None
        last = end.words() if end is not None else _last_line(jobs, job)
        row = {"id": job.id, "status": job.status, "started": job.started, "ended": job.ended, "says": last}
        rows.append(row | ({} if end is None else {"exit": end.code, "saved": end.saved()}))
        until = time.time() if job.ended is None else job.ended
        took = "" if job.started is None else f"{until - job.started:6.0f} s"
        lines.append(f"  {job.id:<20} {job.status:<9} {clock(job.started)} {took}  {last}")
    more = len(found) - shown
    if more > 0:
        lines.append(f"  {more} earlier attempt{'s' if more > 1 else ''} not shown")
    return {"name": name, "attempts": rows, "text": "\n".join(lines)}


def _last_line(jobs: Jobs, job: Job) -> str:
    try:
        lines = [line for line in jobs.log(job.id).splitlines() if line.strip() and not line.startswith(MARK)]
    except (Unanswered, NoSuchJob) as error:
        return f"its log cannot be read: {error}"
    return lines[-1].strip()[:160] if lines else job.message[:160]


def logs(jobs: Jobs, name: str, follow: bool, write: Say, say: Say) -> int:
    """The newest attempt's log, or that of the attempt `name` is the id of."""
    job = jobs.known(name)[-1]
    if not follow:
        for line in jobs.log(job.id).splitlines():
            if not line.startswith(MARK):
                write(line)
        return OK
    follower = Follower(jobs, job.id, write, say)
    try:
        over = follower.run()
    except KeyboardInterrupt:
        say(f"{job.id} goes on")
        return INTERRUPTED
    assert over is not None  # it has no time limit
    say(f"{job.id}: {follower.ending(over).words()}")
    return OK


@dataclass(frozen=True)
class Stopping:
    """`rlkd stop`."""

    jobs: Jobs
    name: str
    for_good: bool
    write: Say
    say: Say
    after_kill_s: float = AFTER_KILL_S

    def run(self) -> int:
        """Ask, show the save, and do not return before the job is over. InfrastructureError if it is not in time."""
        job = self.jobs.known(self.name)[-1]
        if self.for_good:
            self.jobs.make_last(job.id, who())
        if job.over:
            self.say(f"{job.id} is over already: {ended(self.jobs, job).words()}{self._who_goes_on(job)}")
            return OK
        self._warn(job)
        before = len(self.jobs.log(job.id))
        until = time.monotonic() + job.stop_wait_s + self.after_kill_s
        asked = self.jobs.stop(job.id)
        state = f"asked to save and end; Ray kills it in {job.stop_wait_s} s" if asked else "was not running any more"
        self.say(f"{job.id}: {state} (Ctrl-C leaves it alone to do that)")
        return self._watch(job, before, until)

    def _watch(self, job: Job, before: int, until: float) -> int:
        follower = Follower(self.jobs, job.id, self.write, self.say, until=until, seen=before, look_s=1.0, again_s=0.5)
        try:
            over = follower.run()
        except KeyboardInterrupt:
            self.say(f"{job.id} was asked to end and does that by itself; rlkd status {self.name} says when it has")
            return INTERRUPTED
        end = self._end_of(job) if over is None else follower.ending(over)
        self.say(f"{job.id}: {end.words()}{self._who_goes_on(job)}")
        return OK if end.code is not None else end.exit_code()

    def _warn(self, job: Job) -> None:
        if job.stop_wait_s <= RAYS_WAIT_S:
            self.say(
                f"warning: {job.id} was submitted without RAY_JOB_STOP_WAIT_TIME_S: Ray kills it after "
                f"{job.stop_wait_s} s, whether its save is done or not"
            )

    def _who_goes_on(self, job: Job) -> str:
        """A client that follows the run submits it again."""
        retries = job.told("rlkd_retries") or "0"
        if self.for_good or retries == "0":
            return ""
        return (
            f"\nthe client of {job.told('rlkd_by')}, if it is still there, submits it again (up to {retries} times): "
            f"rlkd stop {self.name} --for-good ends that too"
        )

    def _end_of(self, job: Job) -> Ending:
        """Of a job whose end nobody saw in time: it is asked for once more. InfrastructureError if it is not over."""
        with suppress(Unanswered, NoSuchJob):
            job = self.jobs.get(job.id)
        if job.over:
            return ended(self.jobs, job)
        raise InfrastructureError(
            "RLKD-I233",
            f"{job.id} is {job.status} {job.stop_wait_s + self.after_kill_s:.0f} s after it was asked to end",
            where=self.jobs.dashboard(job.id),
            fix="its head node does not do what it is told: see `ray status` there; `ray stop` ends everything on it",
        )
