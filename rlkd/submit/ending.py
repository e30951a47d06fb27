"""How a job ended: from its last line, from Ray, or from what `rlkd train` printed; and in words.

Ray keeps no exit code of a job that was stopped (JobInfo.driver_exit_code is None), and whoever submits from elsewhere
sees none of the cluster's disks. So entry.py prints one line at the end, and a job's log is what everybody can read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlkd.core.errors import INFRASTRUCTURE, OK, PREFLIGHT, RESUBMIT
from rlkd.submit.jobs import Job

MARK = "[rlkd-exit] "
_PRINTED = re.compile(r"\((?:\w+, )?exit (\d+)\)")
_NODE_DIED = "because its node has died"  # what Ray's GCS says of an actor then, also where the node was preempted
_NOISE = re.compile(r"^\s*(class_name|actor_id|pid|name|namespace): ")  # lines of that message that help nobody
_LOG = ", last available logs"  # Ray puts the log's end behind it, which is in the log too
_NO_ROOM = {"RLKD-E020", "RLKD-E021"}  # how exit.json's `cause` begins where the cluster could not place the run
SAID = 300  # characters of Ray's reason
LINES = 30  # from the end, where `rlkd train` says its exit code


@dataclass(frozen=True)
class Ending:
    """`code`: of the driver, None where nobody knows: it was killed, or never started."""

    code: int | None
    record: Mapping[str, Any] | None = None  # exit.json of the attempt
    save_s: float | None = None  # the longest save and optimizer step of the run so far
    step_s: float | None = None
    why: str | None = None  # what Ray says of a job that failed and has no exit code of its own
    node_lost: bool = False  # its driver's node died, says Ray: it did not fail by itself

    @property
    def again(self) -> bool:
        """Whether the same command goes on with it, elsewhere or later."""
        return self.code == RESUBMIT or self.node_lost

    @property
    def no_room(self) -> bool:
        """Whether the driver found no place for the run: after an attempt that had one, a node was lost meanwhile."""
        return self.code == PREFLIGHT and str((self.record or {}).get("cause")).partition(":")[0] in _NO_ROOM

    def saved(self) -> int | None:
        step = (self.record or {}).get("saved")
        return step if isinstance(step, int) else None

    def words(self) -> str:
        """One line: why, at which step, what is kept."""
        if self.code is None and self.why is not None:
            lost = "the driver's node was lost" if self.node_lost else "failed without a word of its own"
            return f"{lost}; Ray says: {self.why}; the last checkpoint stands"
        if self.code is None:
            return "killed: it said nothing at its end; the last checkpoint stands"
        if self.code == OK:
            return "done (exit 0)"
        r = self.record or {}
        kind = r.get("class")
        parts = [f"exit {self.code}" + (f" ({kind})" if kind else "")]
        if r.get("cause"):
            parts.append(str(r["cause"]))
        saved = self.saved()
        if r and f"step {saved}" not in parts[-1]:  # `rlkd train` says it itself, where it was asked to stop
            parts.append("nothing saved" if saved is None else f"saved: step {saved}")
        return "; ".join(parts)

    def exit_code(self) -> int:
        """What the client ends with."""
        return INFRASTRUCTURE if self.code is None else self.code


def line(code: int, record: Mapping[str, Any] | None, save_s: float | None, step_s: float | None) -> str:
    """What entry.py prints at its end."""
    from rlkd.report.files import as_json

    return MARK + as_json({"exit": code, "record": record, "save_s": save_s, "step_s": step_s})


def ending(job: Job, log: str) -> Ending:
    """Of a job that is over. `log`: its end at least."""
    marked = [text[len(MARK) :] for text in log.splitlines() if text.startswith(MARK)]
    if marked:
        try:
            said = json.loads(marked[-1])
            return Ending(int(said["exit"]), said.get("record"), said.get("save_s"), said.get("step_s"))
        except (ValueError, KeyError, TypeError):  # cut in the middle: the driver was killed while it wrote it
            return _unsaid(job, _known(job))
    code = _known(job)
    if code is None and job.status == "STOPPED":
        printed = [int(found) for text in log.splitlines()[-LINES:] for found in _PRINTED.findall(text)]
        code = printed[-1] if printed else None
    return _unsaid(job, code)


def _unsaid(job: Job, code: int | None) -> Ending:
    """Of one whose last line is not there. A job that was asked to stop ends as STOPPED, never as FAILED."""
    if code is not None or job.status != "FAILED":
        return Ending(code)
    # of a program that ended by itself Ray's message holds its log, which may say anything
    lost = job.exit_code is None and job.error_type == "JOB_SUPERVISOR_ACTOR_DIED" and _NODE_DIED in job.message
    return Ending(None, why=_reason(job.message) or None, node_lost=lost)


def _reason(message: str) -> str:
    """Ray's message in one line."""
    lines = [text for text in message.partition(_LOG)[0].splitlines() if not _NOISE.match(text)]
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= SAID else f"{text[:SAID]}…"


def _known(job: Job) -> int | None:
    if job.status == "SUCCEEDED":
        return OK
    return job.exit_code if job.exit_code is not None and job.exit_code >= 0 else None
