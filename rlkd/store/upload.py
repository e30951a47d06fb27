"""Copies of the checkpoints in a remote store, made in the background: no outage there stops or slows the run."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, wait_random_exponential

from rlkd.core.errors import CheckpointError
from rlkd.store.disk import in_words
from rlkd.store.manifest import Manifest
from rlkd.store.remote import Remote
from rlkd.store.retention import Keep, special

SLOWEST_RETRY_S = 30.0  # between two tries of one upload


@dataclass(frozen=True)
class Job:
    path: Path
    manifest: Manifest
    since: float  # monotonic seconds


class Uploads:
    """One thread, one checkpoint under way and at most one waiting: a newer one takes its place."""

    def __init__(self, remote: Remote, keep: Keep, pins: Callable[[], set[int]]) -> None:
        self.remote, self.keep, self.pins = remote, keep, pins
        self._news: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._hurry = threading.Event()  # set: do not go on trying in vain
        self._waiting: Job | None = None
        self._now: Job | None = None
        self._thread: threading.Thread | None = None
        self._scores: dict[int, float | None] = {}  # of what is in the store, by step
        self._pinned: set[int] | None = None  # in the store; None: not known yet

    def put(self, path: Path, manifest: Manifest) -> None:
        """Upload this one next, instead of one that still waits."""
        with self._changed:
            if self._waiting is not None:
                self._say(f"step {self._waiting.manifest.step} is not uploaded: step {manifest.step} takes its place")
            if (now := self._now) is not None:
                lag = time.monotonic() - now.since
                size = in_words(now.manifest.size)
                self._say(
                    f"uploads lag: step {now.manifest.step} ({size}) is under way for {lag:.0f} s, and step "
                    f"{manifest.step} waits; fewer checkpoints (checkpoint.every) would all arrive",
                    lag_s=lag,
                )
                self._hurry.set()
            self._waiting = Job(path, manifest, time.monotonic())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rlkd-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def holding(self) -> set[int]:
        """Steps that are not uploaded yet, and must not be deleted here."""
        with self._changed:
            return {job.manifest.step for job in (self._now, self._waiting) if job is not None}

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """What there is to tell since the last call: texts, and fields with them."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def close(self, wait_s: int | float) -> bool:
        """Wait until all is uploaded, `wait_s` at most; whether it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._now is None and self._waiting is None, timeout=wait_s)
            left = [job.manifest.step for job in (self._now, self._waiting) if job is not None]
            self._waiting = None
            self._hurry.set()
        if left:
            steps = " and ".join(str(step) for step in left)
            self._say(f"step {steps} is not in {self.remote.url}: it is only on the disk of this machine", steps=left)
        return not left

    def _run(self) -> None:
        while True:
            with self._changed:
                self._now = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None)
                self._now, self._waiting = self._waiting, None
                self._hurry.clear()
            assert self._now is not None
            try:
                self._upload(self._now)
            except Exception as e:  # the thread must live: a later checkpoint may fare better
                self._say(f"step {self._now.manifest.step} is not uploaded: {type(e).__name__}: {e}")

    def _upload(self, job: Job) -> None:
        step = job.manifest.step
        retrying = Retrying(
            stop=lambda _: self._hurry.is_set() or not job.path.is_dir(),
            wait=wait_random_exponential(multiplier=0.5, max=SLOWEST_RETRY_S),
            retry=retry_if_exception_type(OSError),
            sleep=sleep_using_event(self._hurry),
            before_sleep=lambda state: self._failed(step, state),
            reraise=True,
        )
        if not retrying(self.remote.upload, job.path, job.manifest):
            return
        tries = retrying.statistics["attempt_number"]
        seconds = time.monotonic() - job.since
        after = "" if tries == 1 else f", after {tries - 1} failures"
        self._say(f"step {step} is in {self.remote.url}{after}", step=step, seconds=seconds)
        try:
            self._prune(job.manifest)
        except (OSError, CheckpointError) as e:
            self._say(f"no old checkpoint is deleted in {self.remote.url}: {e}")

    def _failed(self, step: int, state: RetryCallState) -> None:
        if state.attempt_number == 1:  # told once; the end is told too
            why = state.outcome.exception() if state.outcome else None
            self._say(f"step {step} cannot be uploaded now, and is tried again while training goes on: {why}")

    def _prune(self, manifest: Manifest) -> None:
        """Delete there what `keep` does not want, and what was begun and never finished. Not the newest two."""
        pins = self.pins()
        if pins != self._pinned:
            self.remote.set_pins(pins)
            self._pinned = pins
        self._scores[manifest.step] = manifest.score
        there = self.remote.steps()
        for step in there:
            if step not in self._scores:
                self._scores[step] = self.remote.manifest(step).score
        newest = set(there[-self.keep.newest :])
        stay = newest | special({step: self._scores[step] for step in there}, self.keep, pins)
        for step in self.remote.begun():
            if step not in stay and step < min(newest, default=0):
                self.remote.remove(step)

    def _say(self, text: str, **fields: Any) -> None:
        self._news.put((text, fields))
