"""Ray's Jobs API, as far as rlkd uses it: every call has a time limit and a name, jobs have one name and a number.

A run NAME is the jobs NAME-1, NAME-2, …, one for each attempt, also those that somebody submits by hand with these ids.
`~` is in no run's name: NAME-2~stop is a job that does nothing, and tells whoever follows NAME-2 that it is the last.
"""

import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from rlkd.core.errors import ConfigError, PreflightError, nearest
from rlkd.workers.aside import asked
from rlkd.workers.cluster import token

ANSWER_S = 10.0  # for one answer of the dashboard
UPLOAD_S = 120.0  # for the package
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in them Ray looks first, whatever address it is given
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # in a job's environment: seconds between Ray's SIGTERM and its SIGKILL
RAYS_WAIT_S = 3  # what Ray waits where that is not set
CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
Result = TypeVar("Result")


@runtime_checkable
class Client(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def submit_job(self, **options: Any) -> str: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def list_jobs(self) -> Sequence[Any]: ...
    def stop_job(self, job_id: str) -> bool: ...
    def delete_job(self, job_id: str) -> bool: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


class Unanswered(Exception):
    """The dashboard does not answer now; it may later."""


class NoSuchJob(Exception):
    """The cluster knows no job of this id."""


@dataclass(frozen=True)
class Job:
    """One attempt, as Ray knows it."""

    id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    exit_code: int | None = None  # of the driver; Ray knows none of a job that was stopped
    message: str = ""
    started: float | None = None  # Unix seconds
    ended: float | None = None
    metadata: Mapping[str, str] | None = None
    stop_wait_s: int = RAYS_WAIT_S  # between SIGTERM and SIGKILL
    error_type: str | None = None  # Ray's JobErrorType, of one that is FAILED

    @property
    def over(self) -> bool:
        return self.status in ENDED

    @property
    def number(self) -> int:
        """Which attempt; 0 if it is none."""
        tail = self.id.rpartition("-")[2]
        return int(tail) if tail.isdecimal() and "~" not in self.id else 0

    @property
    def run(self) -> str:
        """The run that it is an attempt of; "" if it is none."""
        return self.id.rpartition("-")[0] if self.number else ""

    def told(self, key: str) -> str | None:
        """What rlkd wrote down with the job."""
        return (self.metadata or {}).get(key)


@dataclass(frozen=True)
class Jobs:
    """The jobs of one cluster. Methods raise Unanswered, and NoSuchJob where they are given an id."""

    client: Client
    address: str
    answer_s: float = ANSWER_S

    def get(self, job_id: str) -> Job:
        return _job(self._ask(f"the state of {job_id}", lambda: self.client.get_job_info(job_id)))

    def every(self) -> list[Job]:
        return [_job(info) for info in self._ask("the list of jobs", self.client.list_jobs) if info.submission_id]

    def attempts(self, name: str) -> list[Job]:
        """Of a run, the oldest first."""
        return sorted((job for job in self.every() if job.run == name), key=lambda j: j.number)

    def runs(self) -> list[str]:
        """The names of all runs that were submitted, by whomever."""
        return sorted({job.run for job in self.every()} - {""})

    def known(self, name: str) -> list[Job]:
        """The same, or the one attempt that `name` is the id of; PreflightError if there is none."""
        if found := [job for job in self.every() if job.id == name and job.number] or self.attempts(name):
            return found
        names = self.runs()
        close = nearest(name, names)
        fix = f"did you mean {close}?" if close else f"known there: {', '.join(names) or 'no run at all'}"
        raise PreflightError("RLKD-E236", f"no run `{name}` was submitted to this cluster", self.address, fix)

    def submit(self, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        self._ask(
            f"submitting {job_id}",
            lambda: self.client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env=dict(runtime_env),
                metadata=dict(metadata),
            ),
            UPLOAD_S,
        )

    def stop(self, job_id: str) -> bool:
        """Ask Ray to end it: SIGTERM now, SIGKILL later. False if it was not running."""
        return self._ask(f"stopping {job_id}", lambda: self.client.stop_job(job_id))

    def delete(self, job_id: str) -> None:
        self._ask(f"deleting {job_id}", lambda: self.client.delete_job(job_id))

    def log(self, job_id: str) -> str:
        return self._ask(f"the log of {job_id}", lambda: self.client.get_job_logs(job_id))

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """The log from its beginning, and what comes; raises all kinds of errors when the connection is lost."""
        return self.client.tail_job_logs(job_id)

    def is_last(self, job_id: str) -> bool:
        """Whether somebody said that this attempt is to be the last one."""
        return any(job.id == f"{job_id}~stop" for job in self.every())

    def make_last(self, job_id: str, who: str) -> None:
        """Say so."""
        if not self.is_last(job_id):
            self.submit(f"{job_id}~stop", "true", {}, {"rlkd": "stop", "rlkd_by": who})

    def dashboard(self, job_id: str) -> str:
        return f"{self.address}/#/jobs/{job_id}"

    def _ask(self, what: str, call: Callable[[], Result], seconds: float | None = None) -> Result:
        try:
            return within(seconds or self.answer_s, what, call)
        except RuntimeError as error:  # Ray's client: any answer but 200 and those about tokens
            if re.search(r"status code 404", str(error)):
                raise NoSuchJob(what) from error
            raise Unanswered(f"{what}: {error}") from error
        except Exception as error:
            if type(error).__name__ == "AuthenticationError":
                raise no_token(error, self.address) from error
            raise


def within(seconds: float, what: str, call: Callable[[], Result]) -> Result:
    """The result of a call over the network; Unanswered if there is none in time. Its thread is then left behind: the
    library knows no time limit, and cannot be interrupted."""
    try:
        return asked(call, what).result(seconds)
    except TimeoutError as error:
        raise Unanswered(f"{what}: no answer in {seconds:.0f} s") from error
    except OSError as error:  # requests' errors are of this kind
        raise Unanswered(f"{what}: {error}") from error


def connect(address: str | None, seconds: float = ANSWER_S) -> Jobs:
    """The jobs of the cluster whose dashboard is at `address`; None: of RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    ConfigError without any address; PreflightError, after at most `seconds`, if no Ray answers there."""
    where = address or next((os.environ[name] for name in ENVIRONMENT if os.environ.get(name)), None)
    if not where:
        fix = f"--ray http://HEAD:8265, or set {ENVIRONMENT[0]}"
        raise ConfigError("RLKD-C230", "which cluster? No --ray and no address in the environment", "--ray", fix)
    from ray.job_submission import JobSubmissionClient  # importing it takes seconds, which are not the cluster's

    full = where if "://" in where or where == "auto" else f"http://{where}"
    try:
        client = within(seconds, f"connecting to {full}", lambda: _client(full, JobSubmissionClient))
    except Exception as error:  # Ray's client raises whatever it meets: an answer of another server, a wrong scheme
        if type(error).__name__ == "AuthenticationError":
            raise no_token(error, f"--ray {where}") from error
        text = " ".join(str(error).split())
        raise PreflightError(
            "RLKD-E230",
            f"no Ray dashboard answers within {seconds:.0f} s: {text or type(error).__name__}",
            where=f"--ray {where}",
            fix="the address is that of the dashboard, http://HEAD:8265 (not Ray's own port 6379); "
            "from outside: ssh -L 8265:localhost:8265 HEAD, or kubectl port-forward",
        ) from error
    return Jobs(client, full.rstrip("/") if where != "auto" else client.get_address())


def _client(address: str, make: Callable[..., Any]) -> Any:
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _without(ENVIRONMENT if address != "auto" else ()):
        return make(address, headers=headers())


def headers() -> dict[str, str]:
    """Those of RAY_JOB_HEADERS, as `ray job` reads them, and the cluster's token where one is known here: Ray's own
    client sends it only where RAY_AUTH_MODE says so, while clusters ask for it where there is one (Ray 2.60)."""
    said: dict[str, str] = json.loads(os.environ.get("RAY_JOB_HEADERS") or "{}")
    known = token()
    named = {name.lower() for name in said}
    return said if known is None or "authorization" in named else {**said, "Authorization": f"Bearer {known}"}


def no_token(error: Exception, where: str) -> PreflightError:
    """The cluster wants to know who asks."""
    return PreflightError(
        "RLKD-E239",
        f"the cluster refuses to answer: {' '.join(str(error).split())}",
        where,
        "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's token: ~/.ray/auth_token on its head node",
    )


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without these: in them Ray's client finds another address than the one it is given."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _job(info: Any) -> Job:
    wait = ((info.runtime_env or {}).get("env_vars") or {}).get(WAIT, "")
    kind = getattr(info, "error_type", None)
    return Job(
        info.submission_id,
        str(getattr(info.status, "value", info.status)),
        info.driver_exit_code,
        info.message or "",
        _seconds(info.start_time),
        _seconds(info.end_time),
        info.metadata,
        int(wait) if str(wait).isdecimal() else RAYS_WAIT_S,
        None if kind is None else str(getattr(kind, "value", kind)),
    )


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def clock(seconds: float | None) -> str:
    """A Unix time for people, `?` for an unknown one."""
    return "?" if seconds is None else time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))
