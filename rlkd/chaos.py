"""`rlkd chaos RECIPE`: the same run twice, once in peace and once with things killed at random instants; then compared.

What must come out: every prompt trained exactly once and in the same step (ledger.jsonl row by row), and, with
`deterministic=true`, the same final weights bit by bit. Faults are those of docs/faults.md:

    rollout (F1)  SIGKILL of a rollout worker        learner (F8)  SIGKILL of a learner rank
    stall (F3)    SIGSTOP of a rollout worker        driver (F9)   SIGKILL of the driver; the command again
    reward (F6)   SIGKILL of a reward worker         term (F11)    SIGTERM to the driver; the same command again
    teacher (F7)  SIGKILL of a teacher or reference  flip (F24)    driver killed, a byte of a checkpoint flipped
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rlkd.core.errors import INTERNAL, OK, RESUBMIT, ConfigError, InfrastructureError, PreflightError, nearest
from rlkd.report.files import read_lines
from rlkd.report.history import latest
from rlkd.store.manifest import MANIFEST

FAULTS = {"rollout": "F1", "stall": "F3", "reward": "F6", "teacher": "F7", "learner": "F8", "driver": "F9",
          "term": "F11", "flip": "F24"}  # fmt: skip
ENDS_THE_DRIVER = ("driver", "term", "flip")
Ledger = dict[int, list[list[Any]]]  # step -> rows: ticket, prompt, seed, what, samples


@dataclass(frozen=True)
class Kill:
    """Something that was done to the run."""

    fault: str
    victim: str
    seconds: float  # since this attempt began
    step: int  # the last whole one


@dataclass
class Chaos:
    """One run that is disturbed `kills` times, and started again until it is done."""

    command: Sequence[str]
    directory: Path  # of the run
    faults: Sequence[str]
    kills: int
    gap_s: float  # mean time between two faults
    seed: int = 0
    tell: Callable[[str], None] = print
    once_it_moves: bool = False  # the time to a fault counts from an attempt's first new step, not from its start
    done: list[Kill] = field(default_factory=list)
    attempts: int = 0
    idle_attempts: int = 0  # in a row, without a new step
    seconds: float = 0.0

    def run(self, log: Path, limit_s: float) -> None:
        """InfrastructureError if the run ends in a way that it must not, or takes longer than `limit_s`."""
        self._random, began = random.Random(self.seed), time.monotonic()
        while True:
            before = steps(self.directory)
            code = self._attempt(log, began + limit_s)
            if code == OK:
                break
            if code not in (RESUBMIT, -signal.SIGKILL):
                raise self._wrong(f"the run ended with exit code {code}", log)
            self.idle_attempts = self.idle_attempts + 1 if steps(self.directory) <= before else 0
        self.seconds = time.monotonic() - began

    def _attempt(self, log: Path, until: float) -> int:
        self.attempts += 1
        with log.open("ab") as out:
            driver = subprocess.Popen(self.command, stdout=out, stderr=out)
        began, before = time.monotonic(), steps(self.directory)
        last, gap = (None if self.once_it_moves else began), self._next_gap()
        try:
            while driver.poll() is None:
                now = time.monotonic()
                if now > until:
                    raise self._wrong("the run did not end in time", log)
                if last is None:
                    last = now if steps(self.directory) > before else None
                elif len(self.done) < self.kills and now - last > gap and self._strike(driver, now - began):
                    last, gap = time.monotonic(), self._next_gap()
                time.sleep(0.01)
        finally:
            end(driver)
        return int(driver.returncode)

    def _next_gap(self) -> float:
        """Up to twice the mean. After attempts that came to nothing the run is given time."""
        more = 0.0 if self.once_it_moves else 20.0 * self.idle_attempts
        return self._random.uniform(0.0, 2 * self.gap_s) + more

    def _strike(self, driver: "subprocess.Popen[bytes]", seconds: float) -> bool:
        """Do one of the faults; False if there is nobody to do it to (yet)."""
        fault = self._random.choice(self.faults)
        if fault in ENDS_THE_DRIVER:
            name, pid = "driver", driver.pid
        else:
            there = victims(self.directory, fault, driver.pid)
            if not there:
                return False
            name, pid = self._random.choice(there)
        self.done.append(Kill(fault, name, seconds, steps(self.directory)))
        self.tell(f"[{len(self.done)}/{self.kills}] {fault}: {name} (pid {pid}), step {self.done[-1].step}")
        what = {"stall": signal.SIGSTOP, "term": signal.SIGTERM}.get(fault, signal.SIGKILL)
        try:
            os.kill(pid, what)
        except ProcessLookupError:  # it was quicker
            self.done.pop()
            return False
        if fault in ("driver", "flip"):
            driver.wait()  # or a process that is ending is killed once more, and counted
        if fault == "flip":
            flip_a_byte(self.directory, random.Random(self._random.random()))  # what it draws depends on the files
        return True

    def _wrong(self, what: str, log: Path) -> InfrastructureError:
        last = str(self.done[-1]) if self.done else "no fault"
        return InfrastructureError("RLKD-I171", f"{what} after {last}", where=str(log))


def chaos(
    train: Callable[[str], Sequence[str]],
    directory: Path,
    faults: Sequence[str],
    kills: int,
    gap_s: float = 3.0,
    seed: int = 0,
    limit_s: float = 3600.0,
    tell: Callable[[str], None] = print,
    once_it_moves: bool = False,
) -> dict[str, Any]:
    """Run `train("quiet")` and `train("disturbed")`, commands whose runs are folders of those names in `directory`;
    the comparison, with `text` for people and `exit` 1 if they differ. `once_it_moves`: see `Chaos`."""
    if directory.exists() and any(directory.iterdir()):
        raise PreflightError("RLKD-E171", "the folder is not empty", where=str(directory), fix="give a new --out=DIR")
    directory.mkdir(parents=True, exist_ok=True)
    tell("the quiet run …")
    quiet = Chaos(train("quiet"), directory / "quiet", (), 0, gap_s, tell=tell)
    quiet.run(directory / "quiet.log", limit_s)
    tell(f"… took {quiet.seconds:.0f} s; now {kills} faults")
    disturbed = Chaos(train("disturbed"), directory / "disturbed", faults, kills, gap_s, seed, tell, once_it_moves)
    disturbed.run(directory / "disturbed.log", limit_s)
    return compared(quiet, disturbed)


def compared(quiet: Chaos, disturbed: Chaos) -> dict[str, Any]:
    """Ledgers and final weights of the two."""
    ledgers = [ledger(c.directory) for c in (quiet, disturbed)]
    different = [step for step in sorted({*ledgers[0], *ledgers[1]}) if ledgers[0].get(step) != ledgers[1].get(step)]
    tickets = Counter(row[0] for rows in ledgers[1].values() for row in rows)
    twice = sorted(t for t, n in tickets.items() if n > 1)
    weights = [final_weights(c.directory) for c in (quiet, disturbed)]
    by_fault = Counter(kill.fault for kill in disturbed.done)
    told = ", ".join(f"{n} × {fault} ({FAULTS[fault]})" for fault, n in sorted(by_fault.items())) or "nothing"
    same = not different and not twice
    lines = [
        f"done to the run: {told}; it was started {disturbed.attempts} times",
        f"steps {max(ledgers[1], default=0)}, prompts resolved {len(tickets)}, resolved twice {len(twice)}",
        f"same ledger as the quiet run, step by step: {'yes' if same else f'NO: steps {different[:5]}'}",
        f"same final weights: {'yes' if weights[0] == weights[1] else 'no'} ({weights[0][:12]} and {weights[1][:12]})",
        f"seconds: {quiet.seconds:.0f} in peace, {disturbed.seconds:.0f} disturbed",
    ]
    return {
        "faults": dict(by_fault), "attempts": disturbed.attempts, "steps": max(ledgers[1], default=0),
        "resolved": len(tickets), "twice": twice, "different_steps": different, "same_ledger": same,
        "same_weights": weights[0] == weights[1], "seconds_quiet": quiet.seconds,
        "seconds_disturbed": disturbed.seconds, "exit": OK if same else INTERNAL, "text": "\n".join(lines),
    }  # fmt: skip


def chosen(text: str) -> list[str]:
    """`rollout,F9` → names of FAULTS. ConfigError for others."""
    names = {**{name: name for name in FAULTS}, **{number: name for name, number in FAULTS.items()}}
    found = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word not in names:
            close = nearest(word, list(names))
            known = ", ".join(f"{name} ({number})" for name, number in FAULTS.items())
            fix = f"did you mean {close}?" if close else f"there are {known}"
            raise ConfigError("RLKD-C160", f"--faults={text}: there is no fault `{word}`", where="--faults", fix=fix)
        found.append(names[word])
    return found or list(FAULTS)


def ledger(run: Path) -> Ledger:
    """Rows by step, of the attempt that counts."""
    return {row["step"]: row["rows"] for row in latest(read_lines(run / "ledger.jsonl"))}


def steps(run: Path) -> int:
    """Whole steps done by now, saved or not."""
    try:
        return max(ledger(run), default=0)
    except (OSError, ValueError):
        return 0


def final_weights(run: Path) -> str:
    """The digest of rank 0's weights in the newest checkpoint."""
    newest = max(run.glob(f"checkpoints/step-*/{MANIFEST}"))
    digests: Mapping[str, str] = json.loads(newest.read_text())["facts"]["digests"]
    return digests["rank-0/weights"]


def victims(run: Path, fault: str, driver: int) -> list[tuple[str, int]]:
    """(name, pid) of those whom the fault can meet now: actors of this driver that are alive."""
    rosters = sorted(run.glob("attempts/*/pids.json"))
    try:
        actors = json.loads(rosters[-1].read_text())["actors"] if rosters else {}
    except (OSError, ValueError):
        return []
    if actors.get("driver", {}).get("pid") != driver:
        return []
    kind = "rollout" if fault == "stall" else fault
    others = ("driver", "learner", "rollout", "reward")
    return [
        (name, row["pid"])
        for name, row in actors.items()
        if (name.startswith(kind) or (kind == "teacher" and not name.startswith(others)))
        and row.get("pid") is not None
        and psutil.pid_exists(row["pid"])
    ]


def flip_a_byte(run: Path, chance: random.Random) -> None:
    """In a file of the newest checkpoint, if there are two: the one before must be used then."""
    there = sorted(p.parent for p in run.glob(f"checkpoints/step-*/{MANIFEST}"))
    if len(there) < 2:
        return
    files = [p for p in sorted(there[-1].rglob("*")) if p.is_file() and p.stat().st_size]
    with chance.choice(files).open("r+b") as f:
        place = chance.randrange(os.fstat(f.fileno()).st_size)
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1 << chance.randrange(8)]))


def end(driver: "subprocess.Popen[bytes]") -> None:
    """Of a driver that is still there: itself and all that it started."""
    if driver.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(driver.pid).children(recursive=True):
                process.kill()
        driver.kill()
    driver.wait()


def rlkd_train(recipe: str, overrides: Sequence[str], directory: Path) -> Callable[[str], list[str]]:
    """The command of a run of that name in `directory`."""
    program = [sys.executable, "-m", "rlkd", "train", recipe, *overrides, "checkpoint.remote=null", "report.wandb=off"]
    return lambda name: [*program, f"name={name}", f"report.directory={directory}"]
