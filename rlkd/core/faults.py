"""Places where a test, or `rlkd chaos`, makes something go wrong. Without RLKD_FAULT they do nothing.

    RLKD_FAULT="commit.before_rename=kill; learner.backward@1:3=hang; commit.file:2=enospc"

name, @rank (any, if left out), :n (the n-th time this process comes by; the first, if left out), action:
kill (SIGKILL to this process), exit (os._exit(9)), stop (SIGSTOP), hang (sleeps for ever), raise (RuntimeError),
enospc (OSError, no space left), say (nothing but `True` from `fault`, for the caller to act on).
With RLKD_FAULT_ONCE=DIR each of them happens once in all processes together: a restarted worker does not meet it again.
"""

import errno
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ACTIONS = ("kill", "exit", "stop", "hang", "raise", "enospc", "say")
_RULE = re.compile(r"([\w.]+)(?:@(\d+))?(?::(\d+))?=(\w+)")
_passed: Counter[str] = Counter()


@dataclass(frozen=True)
class Rule:
    name: str
    rank: int | None
    turn: int
    action: str


def rules(text: str) -> list[Rule]:
    """What RLKD_FAULT asks for. ValueError for what it cannot mean."""
    found = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        match = _RULE.fullmatch(part)
        if match is None or match[4] not in ACTIONS:
            raise ValueError(f"RLKD_FAULT: {part!r} is not name@rank:n=action with one of {', '.join(ACTIONS)}")
        found.append(Rule(match[1], int(match[2]) if match[2] else None, int(match[3] or 1), match[4]))
    return found


def fault(name: str, rank: int | None = None) -> bool:
    """A fault point. True if a rule with the action `say` holds here and now; else False, or it does not come back."""
    text = os.environ.get("RLKD_FAULT")
    if not text:
        return False
    _passed[name] += 1
    for rule in rules(text):
        here = rule.name == name and rule.rank in (None, rank)
        if here and rule.turn == _passed[name] and _first_time(rule):
            return _act(rule)
    return False


def _first_time(rule: Rule) -> bool:
    """False if the rule's mark in RLKD_FAULT_ONCE was made before."""
    directory = os.environ.get("RLKD_FAULT_ONCE")
    if not directory:
        return True
    mark = Path(directory) / f"{rule.name}-{rule.rank}-{rule.turn}-{rule.action}"
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _act(rule: Rule) -> bool:
    what = f"RLKD_FAULT: {rule.name}={rule.action}"
    match rule.action:
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP)
        case "exit":
            os._exit(9)
        case "hang":
            while True:
                time.sleep(3600)
        case "raise":
            raise RuntimeError(what)
        case "enospc":
            raise OSError(errno.ENOSPC, what)
    return rule.action == "say"
