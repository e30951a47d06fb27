"""How a job ended: from its last line, from Ray, or from what `rlkd train` printed; and in words.

Ray keeps no exit code of a job that was stopped (JobInfo.driver_exit_code is None), and whoever submits from elsewhere
sees none of the cluster's disks. So entry.py prints one line at the end, and a job's log is what everybody can read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlkd.core.errors import INFRASTRUCTURE, OK, RESUBMIT
from rlkd.submit.jobs import Job

MARK = "[rlkd-exit] "
_PRINTED = re.compile(r"\((?:\w+, )?exit (\d+)\)")
LINES = 30  # from the end, where `rlkd train` says its exit code


@dataclass(frozen=True)
class Ending:
    """`code`: of the driver, None where nobody knows: it was killed."""

    code: int | None
    record: Mapping[str, Any] | None = None  # exit.json of the attempt
    save_s: float | None = None  # the longest save and optimizer step of the run so far
    step_s: float | None = None

    @property
    def again(self) -> bool:
        """Whether the same command goes on with it, elsewhere or later."""
        return self.code == RESUBMIT

    def saved(self) -> int | None:
        step = (self.record or {}).get("saved")
        return step if isinstance(step, int) else None

    def words(self) -> str:
        """One line: why, at which step, what is kept."""
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
            return Ending(_known(job))
    code = _known(job)
    if code is None and job.status == "STOPPED":
        printed = [int(found) for text in log.splitlines()[-LINES:] for found in _PRINTED.findall(text)]
        code = printed[-1] if printed else None
    return Ending(code)


def _known(job: Job) -> int | None:
    if job.status == "SUCCEEDED":
        return OK
    return job.exit_code if job.exit_code is not None and job.exit_code >= 0 else None
