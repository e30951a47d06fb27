"""`rlkd submit`: one run as one Ray Job after the other, until it is done or must not go on.

exit 0        done
exit 75       saved and interrupted: submitted again after a pause, so many times; not after `rlkd stop --for-good`
no exit code  the same if Ray says that the driver's node died
no room       the same of a retry whose nodes went away before it had its places (E020, E021)
anything else the job stays ended; its exit.json is shown, and its exit code is the client's
Ctrl-C        the client lets go; the job goes on
"""

import getpass
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlkd.config.stages import Stage
from rlkd.core.errors import INTERRUPTED, OK, ConfigError, InfrastructureError, PreflightError
from rlkd.submit import preflight
from rlkd.submit.ending import Ending
from rlkd.submit.follow import Follower, ended
from rlkd.submit.grace import stop_s
from rlkd.submit.jobs import WAIT, Job, Jobs, NoSuchJob, Unanswered
from rlkd.submit.package import Package
from rlkd.submit.preflight import Cluster

LONGEST_PAUSE_S = 300.0
PATIENT_S = 60.0  # a run with a longer ray.wait_s waits for nodes itself, and an autoscaler sees what it wants
Say = Callable[[str], None]
Result = TypeVar("Result")


class _ForGood(Exception):
    """Somebody stopped the run for good."""


@dataclass(frozen=True)
class Options:
    """Of `rlkd submit`."""

    retries: int = 20
    pause_s: float = 10.0  # before an attempt that follows one; doubled while attempts come to nothing
    patience_s: float = 3600.0  # for room on the cluster, before such an attempt
    detach: bool = False
    grace_s: int | None = None  # instead of what is reckoned
    env: Mapping[str, str] = field(default_factory=dict)
    python: str = "python"


@dataclass
class Submission:
    """One run on one cluster."""

    jobs: Jobs
    stages: Sequence[Stage]
    package: Package
    options: Options
    write: Say  # the job's log
    say: Say
    sleep: Callable[[float], None] = time.sleep
    last: Ending | None = field(default=None, init=False)  # of the attempt before
    idle: int = field(default=0, init=False)  # attempts in a row that saved nothing new
    gpu: bool = field(default=False, init=False)  # an attempt was planned on GPUs, and none goes on without

    @property
    def name(self) -> str:
        return self.stages[0].config.name

    def run(self) -> int:
        """Until the run has ended; the exit code."""
        self.say(self.package.words())
        try:
            return self._attempts()
        except KeyboardInterrupt:
            return self._let_go()
        except (Unanswered, NoSuchJob) as error:
            raise unanswered(self.jobs, error) from error

    def _attempts(self) -> int:
        retry, job = 0, self._next(0)
        while True:
            if self.options.detach:
                self.say(f"{job.id} goes on by itself, and nobody submits it again; {self._how()}")
                return OK
            job, end = self._follow(job)
            if (code := self._outcome(job, end, retry)) is not None:
                return code
            self._pause()
            if self._is_last(job):
                return self._stopped(end)
            retry += 1
            try:
                job = self._patient(partial(self._next, retry))
            except _ForGood:
                return self._stopped(end)

    def _next(self, retry: int) -> Job:
        return self._there() or self._start(retry)

    def _patient(self, ask: Callable[[], Result]) -> Result:
        """What the cluster answers; between two attempts it is asked again while it does not. An attempt that was
        submitted though nobody said so is found by the next question."""
        began = time.monotonic()
        while True:
            try:
                return ask()
            except Unanswered as error:
                if time.monotonic() - began > self.options.patience_s:
                    raise
                self.say(f"no answer of the cluster ({error}): asked again")
                self.sleep(max(self.options.pause_s, 1.0))

    def _is_last(self, job: Job) -> bool:
        return self._patient(lambda: self.jobs.is_last(job.id))

    def _unless_last(self, previous: Job | None) -> None:
        """_ForGood if somebody said that this attempt was the last one: while the next one waited, too."""
        if previous is not None and self.jobs.is_last(previous.id):
            raise _ForGood

    def _there(self) -> Job | None:
        """An attempt that is running already: it is followed, if it is what would be submitted."""
        attempts = self.jobs.attempts(self.name)
        if not attempts or attempts[-1].over:
            return None
        job = attempts[-1]
        if job.told("rlkd_package") == self.package.digest:
            self.say(f"{job.id} is {job.status} already, with this package: it is followed")
            return job
        raise PreflightError(
            "RLKD-E237",
            f"{job.id} is {job.status}, and was submitted with other files or settings",
            where=self.jobs.dashboard(job.id),
            fix=f"rlkd stop {self.name} --for-good ends it; rlkd logs {self.name} --follow shows it; "
            "or another name=… for this one",
        )

    def _start(self, retry: int) -> Job:
        """Look at the cluster, and submit the next attempt."""
        attempts = self.jobs.attempts(self.name)
        number = 1 + max((job.number for job in attempts), default=0)
        if self.last is None and attempts:
            self.last = ended(self.jobs, attempts[-1])
        self.gpu = self.gpu or preflight.had_gpu(attempts)
        previous = attempts[-1] if retry and attempts else None
        with self._runtime_env() as runtime_env:
            cluster = self._room(runtime_env, retry > 0, previous)
            job_id, options = f"{self.name}-{number}", self.options
            run = Path(self.package.run_folder)
            grace_s, why = stop_s(self.stages, options.grace_s, cluster.config, run, self.last)
            runtime_env["env_vars"][WAIT] = str(grace_s)
            self.gpu = self.gpu or preflight.gives_gpu(cluster, self.stages)
            told = {"rlkd": "run", "rlkd_package": self.package.digest, "rlkd_by": who(),
                    "rlkd_retries": str(0 if options.detach else options.retries - retry)}  # fmt: skip
            self._unless_last(previous)
            self.jobs.submit(job_id, self._entrypoint(), runtime_env, told | ({preflight.GPU: "1"} if self.gpu else {}))
        which = f"attempt {number}" + (f" (retry {retry} of {options.retries})" if retry else "")
        self.say(f"job {job_id}  {which}   stop grace {grace_s} s ({why})   {self.jobs.dashboard(job_id)}")
        return self._patient(lambda: self.jobs.get(job_id))

    @contextmanager
    def _runtime_env(self) -> Iterator[dict[str, Any]]:
        """For Ray, which uploads the folder while the context lasts."""
        with tempfile.TemporaryDirectory(prefix="rlkd-package-") as folder:
            self.package.write(Path(folder))
            yield {"working_dir": folder, "env_vars": dict(self.options.env)}

    def _entrypoint(self) -> str:
        words = [self.options.python, "-m", "rlkd.submit.entry", self.package.run_folder, self.package.recipe]
        more = preflight.on_gpu(self.stages) if self.gpu else []  # not of the package: it is the same one
        return f"exec {shlex.join([*words, *self.package.overrides, *more])}"

    def _room(self, runtime_env: Mapping[str, Any], waits: bool, previous: Job | None) -> Cluster:
        """The cluster, with room for the run. The first attempt is refused without; later ones wait for nodes to come
        back, and say so; _ForGood if somebody does not want that."""
        configs = [stage.config for stage in self.stages]
        patience = min(config.ray.wait_s for config in configs)
        began = time.monotonic()
        while True:
            self._unless_last(previous)
            cluster = preflight.asked(self.jobs, self.name, self.package, runtime_env, self.options.python, self.say)
            fits = preflight.judged(cluster, configs, self.package, self.jobs.address, self.gpu)
            missing = preflight.short(cluster, configs, self.gpu)
            if missing is None:
                self.say(fits)
                return cluster
            if patience >= PATIENT_S:
                self.say(f"preflight on the cluster: {missing}; the run will wait {patience:.0f} s for it (ray.wait_s)")
                return cluster
            if not waits or time.monotonic() - began > self.options.patience_s:
                raise PreflightError(
                    "RLKD-E232",
                    f"the cluster has no room for this run: {missing}",
                    where=self.jobs.address,
                    fix="fewer sampler.workers or learner.ranks, or more nodes; ray.wait_s=900 lets the run wait for "
                    "an autoscaler; `rlkd status` shows what else runs there"
                    + ("; model.device=cpu goes on without GPUs" if self.gpu and not cluster.gpu else ""),
                )
            self.say(f"waiting for room: {missing}")
            self.sleep(max(self.options.pause_s, 1.0))

    def _follow(self, job: Job) -> tuple[Job, Ending]:
        """The job as it is at its end, and how it ended."""
        follower = Follower(self.jobs, job.id, self.write, self.say)
        over = follower.run()
        assert over is not None  # it has no time limit
        return over, follower.ending(over)

    def _outcome(self, job: Job, end: Ending, retry: int) -> int | None:
        """The exit code, or None if the run is to be submitted again."""
        before = None if self.last is None else self.last.saved()
        again = end.again or (retry > 0 and end.no_room)
        self.idle = self.idle + 1 if again and end.saved() == before else 0
        self.last = end
        self.say(f"{job.id}: {end.words()}")
        if not again:
            return self._shown(job, end)
        if self._is_last(job):
            return self._stopped(end)
        if retry >= self.options.retries:
            self.say(f"not submitted again: that was retry {retry} of {self.options.retries}. {self._same()}")
            return end.exit_code()
        return None

    def _shown(self, job: Job, end: Ending) -> int:
        """What to do about an end that is not to be repeated."""
        if end.code == OK:
            return OK
        hint = (end.record or {}).get("hint")
        if hint:
            self.say(f"  = {hint}")
        if end.code is None:
            saving = f"if it was asked to stop: a save did not end in {job.stop_wait_s} s; --grace gives more. "
            self.say(f"  = {saving if job.status == 'STOPPED' else ''}{self._same()}")
        self.say(f"the whole log: rlkd logs {job.id} --ray {self.jobs.address}")
        return end.exit_code()

    def _pause(self) -> None:
        seconds = min(LONGEST_PAUSE_S, self.options.pause_s * 2**self.idle)
        self.say(f"submitted again in {seconds:.0f} s (Ctrl-C: not at all)")
        self.sleep(seconds)

    def _stopped(self, end: Ending) -> int:
        self.say(f"not submitted again: somebody stopped {self.name} for good. {self._same()}")
        return end.exit_code()

    def _let_go(self) -> int:
        """Ctrl-C, at any time: also while an attempt is being submitted."""
        try:
            running = [job.id for job in self.jobs.attempts(self.name) if not job.over]
        except Unanswered:
            running = [self.name]
        if running:
            self.say(f"let go: {running[-1]} goes on, and nobody submits it again. {self._same()}; {self._how()}")
        else:
            self.say(f"nothing runs. {self._same()}")
        return INTERRUPTED

    def _same(self) -> str:
        return "The same rlkd submit command goes on with it"

    def _how(self) -> str:
        where = f"--ray {self.jobs.address}"
        return f"rlkd logs {self.name} --follow {where} shows it, rlkd stop {self.name} {where} saves and ends it"


def who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()} (pid {os.getpid()})"


def unanswered(jobs: Jobs, error: Unanswered | NoSuchJob) -> InfrastructureError:
    return InfrastructureError(
        "RLKD-I232",
        f"the cluster's dashboard gave no answer: {error}",
        where=jobs.address,
        fix="see whether its head node is well; the same command can be given again",
    )


def environment(given: Sequence[str]) -> dict[str, str]:
    """`NAME` of this environment, or `NAME=value`. ConfigError for what is not there."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or (not equals and name not in os.environ):
            what = f"--env {text}: {'no name' if not name else f'{name} is not set here'}"
            raise ConfigError("RLKD-C231", what, "--env", "--env NAME passes a variable on, --env NAME=value sets it")
        found[name] = value if equals else os.environ[name]
    return found
