"""Names in a directory of checkpoints, and whose a half-written one is.

step-000120/                          a checkpoint
.tmp-step-000130-<pid>-<start>-<n>/   one being written, by the process <pid> that began at <start>
.trash-<name>-<pid>-<n>/              one being deleted
.bad/step-000090/                     one that is damaged
.pins/step-000050                     an empty file: never delete that one
LATEST                                the newest one's name; for people, nothing reads it
"""

import os
import re
from itertools import count
from pathlib import Path

BAD, PINS, LATEST = ".bad", ".pins", "LATEST"
_STEP = re.compile(r"step-(\d{6,19})")
_DRAFT = re.compile(r"\.tmp-step-\d{6,19}-(\d+)-(\d+)-\d+")
_numbers = count(1)


def of_step(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and of_step(int(match[1])) == name else None


def of_draft(step: int) -> str:
    """A new name for what this process is about to write."""
    pid = os.getpid()
    return f".tmp-{of_step(step)}-{pid}-{began(pid)}-{next(_numbers)}"


def of_trash(name: str) -> str:
    return f".trash-{name.lstrip('.')}-{os.getpid()}-{next(_numbers)}"


def is_live(draft: str) -> bool:
    """Whether the process that writes this draft still runs on this machine.

    What a process of another machine writes is taken for dead: the run's lease says that there is none.
    """
    match = _DRAFT.fullmatch(draft)
    return match is not None and began(int(match[1])) == int(match[2])


def began(pid: int) -> int | None:
    """When a process began, in clock ticks after boot (a pid alone is used again); None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold anything
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
