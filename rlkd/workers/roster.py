"""Who is where, and how far: `attempts/NNNN/pids.json`, written anew every few seconds while the run lives.

It is what `rlkd why-stuck` reads from another terminal, and what the watchdog takes stacks of:

    {"time": wall seconds, "every_s": …, "host": …, "actors": {"driver": {"pid", "host"}, "rollout-0": {"pid", "host",
     "node", "state", "calls", "tokens", "idle_s"}, …}, "waiting": [["learn step 3", seconds], …]}

A row has what its source knows; `tokens` grows while an actor gets anywhere, `idle_s` counts from the last one that it
wrote although it has work (null: it has none).
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlkd.core.errors import InfrastructureError
from rlkd.workers import stacks
from rlkd.workers.vitals import Place

FILE, STACKS = "pids.json", "stacks"
EVERY_S = 5.0
DUMP_S = 20.0  # for the stacks of one process, wherever it is

Source = Callable[[], Mapping[str, Mapping[str, Any]]]  # Pool.roster and its like


class Roster:
    """Of one attempt; `directory` is its folder. The driver makes it, and shows its own stacks from then on."""

    def __init__(
        self,
        directory: Path,
        on_stall: Literal["warn", "abort"] = "warn",
        tell: Callable[[str, str], None] | None = None,
    ) -> None:
        self.directory, self._on_stall = directory, on_stall
        self._tell = tell or (lambda *_: None)
        self._sources: list[Source] = []
        self.late: Callable[[], Sequence[tuple[str, float]]] = (
            tuple  # what the loop awaits: Stages.late, once it is there
        )
        stacks.listen()

    def add(self, source: Source) -> None:
        """Somebody else who has actors."""
        self._sources.append(source)

    def actors(self) -> dict[str, dict[str, Any]]:
        """All rows, the driver's first."""
        driver = {"pid": os.getpid(), "host": socket.gethostname(), "node": "", "state": "runs the loop"}
        return {"driver": driver} | {name: dict(row) for source in self._sources for name, row in source().items()}

    def counters(self) -> tuple[tuple[str, Any], ...]:
        """What moves while the run does: for the watchdog (train/stages.py)."""
        return tuple((name, row.get("tokens")) for name, row in self.actors().items())

    async def keep(self, every_s: float = EVERY_S) -> None:
        """Write the file now and every so often. Never returns. A disk that takes nothing is told of once."""
        told = False
        while True:
            try:
                self.write(every_s)
            except OSError as error:
                if not told:
                    self._tell("warning", f"{self.directory / FILE}: {error.strerror}: `rlkd why-stuck` will know less")
                told = True
            await asyncio.sleep(every_s)

    def write(self, every_s: float = EVERY_S) -> None:
        """The file as of now, replaced whole. OSError if that cannot be."""
        record = {
            "time": time.time(),
            "every_s": every_s,
            "host": socket.gethostname(),
            "actors": self.actors(),
            "waiting": [list(one) for one in self.late()],
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f".{FILE}.tmp"
        partial.write_text(json.dumps(record, indent=1))
        os.replace(partial, self.directory / FILE)

    # --- when something hangs

    async def stacks(self, name: str, place: Place) -> str:
        """Take the stacks of one actor, on whatever node; where they are, or why they are not."""
        try:
            return await stacks.write_anywhere(self.directory / STACKS, name, place)
        except Exception as error:  # of Ray, of the disk: the run has other troubles now
            return f"no stacks of {name}: {type(error).__name__}: {str(error)[:200]}"

    async def _stacks_in_time(self, name: str, place: Place) -> str:
        async with asyncio.timeout(DUMP_S):
            return await self.stacks(name, place)

    async def stalled(self, text: str) -> None:
        """Nothing moves: everybody's stacks, then a warning, or the end of the run (health.on_stall)."""
        rows = [(name, Place(row["pid"], row.get("node", ""), row["host"])) for name, row in self.actors().items()
                if "pid" in row]  # fmt: skip
        said = await asyncio.gather(*(self._stacks_in_time(*row) for row in rows), return_exceptions=True)
        told = [s if isinstance(s, str) else f"no stacks of {name} within {DUMP_S:g} s"
                for (name, _), s in zip(rows, said, strict=True)]  # fmt: skip
        self._tell("stalled", f"nothing moves any more; awaited: {text}\n" + "\n".join(f"  {line}" for line in told))
        if self._on_stall == "abort":
            raise InfrastructureError(
                "RLKD-I005",
                f"nothing moved any more; awaited: {text}",
                where=str(self.directory / STACKS),
                fix="the stacks in there say what each process was doing; raise schedule.stall_s if a step or a save "
                "may take this long, or set health.on_stall=warn; the same command continues",
            )
