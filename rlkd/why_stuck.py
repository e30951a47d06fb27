"""`rlkd why-stuck RUN`: why a run does not get on, or how it ended. From another terminal, with nothing but its folder.

Reads `attempts/NNNN/pids.json` (workers/roster.py), takes the stacks of its processes that are on this machine, and
says in one sentence what is probably the matter. Of a run that is over it tells the end.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rlkd.core.errors import PreflightError
from rlkd.report.files import read_lines
from rlkd.workers import stacks
from rlkd.workers.roster import FILE, STACKS
from rlkd.workers.stacks import Dump

OVERDUE = 3  # times its interval: a driver that has not written for so long does not come round any more
QUIET_S = 20.0  # without a token: worth a word
LONG_S = 60.0  # a wait worth a word
EVENTS = 5  # the last ones


@dataclass(frozen=True)
class Actor:
    """One process of the run, as its roster and this machine's system tell."""

    name: str
    row: Mapping[str, Any]
    here: bool  # on this machine
    state: str | None  # of the process: running, sleeping, stopped, zombie; None: gone, or elsewhere
    dump: Dump | None = None

    @property
    def gone(self) -> bool:
        return self.here and self.state in (None, "zombie", "dead")

    @property
    def top(self) -> str:
        """What it is doing, as the end of a sentence."""
        frame = self.dump.top if self.dump is not None else None
        return f"its top frame is {frame}" if frame else "its stack could not be read"


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    age_s: float  # of the roster
    every_s: float
    actors: Mapping[str, Actor] = field(default_factory=dict)
    waiting: Sequence[tuple[str, float]] = ()  # what the loop awaits and for how long, the longest first


def why_stuck(
    run: Path,
    take: Callable[[Path, str, int], tuple[Path, Dump]] = stacks.write,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """What is the matter with a run: `diagnosis` in one sentence, `text` with all that was found. PreflightError if the
    folder is no run's."""
    if not (run / "run.json").exists():
        raise PreflightError("RLKD-E131", "this is no run's folder: it has no run.json", where=str(run))
    attempts = sorted((run / "attempts").glob("[0-9]*")) if (run / "attempts").is_dir() else []
    if not attempts or not (attempts[-1] / FILE).exists():
        said = "nothing is known of its processes: it ended, or was killed, before it started any"
        return _told(run, _ended(run, attempts[-1] if attempts else None) or said, [], None)
    record = json.loads((attempts[-1] / FILE).read_text())
    ended = _ended(run, attempts[-1])
    snapshot = _snapshot(record, clock(), attempts[-1] / STACKS, None if ended else take)
    driver = snapshot.actors.get("driver")
    if ended is None and driver is not None and driver.gone:
        ended = (
            f"the run is over: its driver (pid {driver.row['pid']}) is gone, and left no word of its end: it was killed"
        )
    return _told(run, ended or diagnosis(snapshot), _lines(snapshot), snapshot)


def diagnosis(now: Snapshot) -> str:
    """The one sentence. The first of these that holds: a process is stopped or gone, the driver's loop is stuck, a
    worker with work writes nothing, something is awaited for long."""
    for actor in now.actors.values():
        if actor.here and actor.state == "stopped":
            pid = actor.row["pid"]
            return f"{actor.name} (pid {pid}) is stopped by a signal: `kill -CONT {pid}` lets it go on"
    for actor in now.actors.values():
        if actor.gone and actor.row.get("state") != "is lost":
            return f"the process of {actor.name} (pid {actor.row['pid']}) is gone; the run has not noticed yet"
    driver = now.actors.get("driver")
    if driver is not None and now.age_s > OVERDUE * now.every_s:
        return f"the driver has not come round its loop for {now.age_s:.0f} s; {driver.top}"
    quiet = [a for a in now.actors.values() if a.row.get("idle_s") and a.row["idle_s"] + now.age_s > QUIET_S]
    if quiet:
        return _quiet(max(quiet, key=lambda a: float(a.row["idle_s"])), now)
    if now.waiting and now.waiting[0][1] > LONG_S:
        what, seconds = now.waiting[0]
        doer = _about(what, now.actors)
        return f"`{what}` has been awaited for {seconds:.0f} s" + (f"; {doer.name}: {doer.top}" if doer else "")
    return "nothing is stuck: the driver goes round its loop, and every worker with work writes"


def _quiet(worst: Actor, now: Snapshot) -> str:
    idle = [name for name, a in now.actors.items() if a.row.get("calls") == 0 and _role(name) == _role(worst.name)]
    beside = f" while {', '.join(idle)} {'is' if len(idle) == 1 else 'are'} idle" if idle else ""
    calls = worst.row.get("calls")
    return (
        f"{worst.name} has written no token for {worst.row['idle_s'] + now.age_s:.0f} s with {calls} calls under "
        f"way{beside}; {worst.top}"
    )


def _role(name: str) -> str:
    return name.rpartition("-")[0]


def _about(what: str, actors: Mapping[str, Actor]) -> Actor | None:
    """Whose work a stage is."""
    roles = {"learn": "learner", "save": "learner", "sync": "learner", "rollout": "rollout", "evaluate": "rollout",
             "verify": "reward", "score": "reference"}  # fmt: skip
    role = roles.get(what.split()[0])
    return next((a for name, a in actors.items() if role is not None and _role(name) == role), None)


def _snapshot(
    record: Mapping[str, Any], now: float, directory: Path, take: Callable[[Path, str, int], tuple[Path, Dump]] | None
) -> Snapshot:
    """The roster, and what the system says of those processes that are on this machine."""
    actors, host = {}, socket.gethostname()
    for name, row in record["actors"].items():
        here = row.get("host") == host and "pid" in row
        state = _state(row["pid"], record["time"]) if here else None
        dump = None
        if take is not None and state not in (None, "zombie", "dead") and row["pid"] != os.getpid():
            _, dump = take(directory, name, row["pid"])
        actors[name] = Actor(name, row, here, state, dump)
    waiting = sorted(((str(w), float(s)) for w, s in record["waiting"]), key=lambda one: -one[1])
    return Snapshot(max(0.0, now - record["time"]), float(record["every_s"]), actors, waiting)


def _state(pid: int, known_at: float) -> str | None:
    """None too for a process that has this pid by now and is another one."""
    try:
        process = psutil.Process(pid)
        return None if process.create_time() > known_at + 1.0 else str(process.status())
    except psutil.NoSuchProcess:
        return None


def _ended(run: Path, attempt: Path | None) -> str | None:
    """How the newest attempt ended, if it said so."""
    if attempt is not None and (attempt / "exit.json").exists():
        end = json.loads((attempt / "exit.json").read_text())
        return f"the run is over (exit {end.get('code')}): {end.get('cause') or 'it is done'}"
    last = (json.loads((run / "run.json").read_text()).get("attempts") or [{}])[-1]
    return f"the run is over (exit {last['exit']})" if "exit" in last else None


def _lines(now: Snapshot) -> list[str]:
    lines = [f"processes, as of {now.age_s:.0f} s ago:"]
    for actor in now.actors.values():
        row = actor.row
        known = [f"pid {row['pid']}"] if "pid" in row else []
        known += [str(row["state"])] if row.get("state") else []
        known += [f"{row['calls']} calls"] if row.get("calls") is not None else []
        known += [f"{row['tokens']} tokens"] if row.get("tokens") is not None else []
        known += [f"none for {row['idle_s'] + now.age_s:.0f} s"] if row.get("idle_s") else []
        known += [actor.state or "gone"] if actor.here else [f"on {row['host']}"] if "host" in row else []
        frame = f"   {actor.dump.top or actor.dump.text}" if actor.dump is not None else ""
        lines.append(f"  {actor.name}: {', '.join(known)}{frame}")
    if now.waiting:
        lines += ["awaited:", *(f"  {what}: {seconds + now.age_s:.0f} s" for what, seconds in now.waiting[:8])]
    return lines


def _told(run: Path, sentence: str, lines: Sequence[str], snapshot: Snapshot | None) -> dict[str, Any]:
    events = read_lines(run / "events.jsonl")[-EVENTS:]
    steps = read_lines(run / "metrics.jsonl")[-1:]
    last = [f"last step: {row['step']} at {row.get('time')}" for row in steps]
    shown = [f"  {e.get('time', '')} [{e.get('kind')}] {str(e.get('text', '')).splitlines()[0][:200]}" for e in events]
    text = "\n".join([sentence, "", *last, *lines, *(["last events:", *shown] if shown else [])])
    taken = snapshot is not None and any(a.dump for a in snapshot.actors.values())
    if taken:
        text += f"\nstacks of all of them: {run}/attempts/*/{STACKS}"
    actors = {} if snapshot is None else {n: {**a.row, "process": a.state} for n, a in snapshot.actors.items()}
    return {"diagnosis": sentence, "actors": actors, "events": events, "text": text}
