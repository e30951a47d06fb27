"""Worked answers: those that came with a prompt, and those that live teachers write, each written and paid for once.

`traces.jsonl` in the run's directory keeps every text, wrong ones too, one line each:

    {"id": prompt, "teacher": name, "text": …, "quality": reward, "reward": reward, "finish": stop | length | aborted}

which is also a source of stored demonstrations (`data.train.traces`). A reward of null was not judged yet.
"""

import asyncio
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from rlkd.core.errors import WorkerLost
from rlkd.core.ports import Verify, Writer, as_demonstration
from rlkd.core.types import Demonstration, Finish, Prompt

Key = tuple[str, str]  # prompt id, teacher


@dataclass(frozen=True)
class Told:
    """What a teacher wrote to a prompt, once."""

    text: str
    finish: Finish
    reward: float = math.nan  # NaN: nobody could judge it yet


@dataclass
class LiveTraces:
    """The port `Traces`. Without writers, what is stored with the prompt. Use it from one event loop."""

    writers: Mapping[str, Writer]
    tokens_of: Callable[[Prompt, str], Int32[np.ndarray, "_"] | str]  # of the policy, end token last; or why not
    verify: Verify
    path: Path
    max_tokens: int  # of a trace, with its end token
    context: int  # of prompt and trace
    success: float = 0.5  # a reward above this is right
    report: Callable[[str, str], None] = lambda *_: None
    counts: Counter[str] = field(default_factory=Counter, init=False)  # texts, by what became of them

    def __post_init__(self) -> None:
        self._told = self._read()
        self._locks: dict[Key, asyncio.Lock] = {}

    async def __call__(self, prompt: Prompt) -> tuple[Demonstration, ...]:
        """Stored ones first, as they are; then one right answer of each teacher that has one. WorkerLost if a teacher
        is lost: what the others wrote meanwhile is kept for the next call."""
        asked = [self._one(prompt, name, writer) for name, writer in self.writers.items()]
        found = await asyncio.gather(*asked, return_exceptions=True)
        errors = [f for f in found if isinstance(f, BaseException)]
        if errors:
            raise min(errors, key=lambda e: isinstance(e, WorkerLost))  # what asking again cannot mend comes first
        return (*prompt.demonstrations, *(f for f in found if isinstance(f, Demonstration)))

    async def _one(self, prompt: Prompt, name: str, writer: Writer) -> Demonstration | None:
        """The teacher's answer if it is right. Who comes second waits for who came first, and asks only if that one
        gave up."""
        key = prompt.id, name
        async with self._locks.setdefault(key, asyncio.Lock()):
            told, new = self._told.get(key), False
            if told is None:
                written = await writer.write(prompt.conversation, _seed(prompt, name))
                self.counts["written"] += 1
                if not written.text and written.finish is not Finish.STOP:
                    return None  # it could not read the prompt: nothing to keep, nothing paid
                told, new = Told(written.text, written.finish), True
            return await self._judged(prompt, name, told, new)

    async def _judged(self, prompt: Prompt, name: str, told: Told, new: bool) -> Demonstration | None:
        """The text as a demonstration if it is whole, fits and is right. A text that nobody has seen yet is kept in
        any case, even if judging it fails: it was paid for."""
        demonstration = self._whole(prompt, name, told, new)
        before = told
        try:
            if demonstration is not None and math.isnan(told.reward):
                (judged,) = await self.verify(prompt, [as_demonstration(prompt, demonstration, (0, 0))])
                told = replace(told, reward=judged.reward)
                self.counts["right" if told.reward > self.success else "not_right"] += 1
        finally:
            if new or told is not before:
                self._keep((prompt.id, name), told)
        if demonstration is None or not told.reward > self.success:
            return None
        return replace(demonstration, quality=told.reward)

    def _whole(self, prompt: Prompt, name: str, told: Told, new: bool) -> Demonstration | None:
        """The text in the policy's tokens; None if it is cut, does not fit or cannot be said with them."""
        tokens: Any = self.tokens_of(prompt, told.text) if told.finish is Finish.STOP else "cut before its end"
        room = min(self.max_tokens, self.context - len(prompt.tokens))
        if not isinstance(tokens, str) and len(tokens) > room:
            tokens = f"{len(tokens)} tokens, over the {room} there is room for"
        if not isinstance(tokens, str):
            return Demonstration(name, tokens)
        if new:
            self.counts["left_out"] += 1
            text = f"{name}: its answer to {prompt.id} is left out: {tokens} ({self.counts['left_out']} so far)"
            self.report("traces", text)
        return None

    # --- the file

    def _keep(self, key: Key, told: Told) -> None:
        """Remember a text, and append it as one line in one write; a later line of the same key replaces it."""
        self._told[key] = told
        reward = None if math.isnan(told.reward) else told.reward
        row = {"id": key[0], "teacher": key[1], "text": told.text, "quality": reward, "reward": reward}
        line = json.dumps({**row, "finish": told.finish.value}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode("utf-8", "replace"))
        except OSError as error:
            self.report("warning", f"{self.path}: {error.strerror}: a teacher's text is kept in memory only")

    def _read(self) -> dict[Key, Told]:
        """What earlier attempts were told. A last line without its end is taken out; lines that say nothing usable
        are passed over; both are counted and reported."""
        if not self.path.exists():
            return {}
        *lines, torn = self.path.read_bytes().split(b"\n")
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(self.path.stat().st_size - len(torn))
            self.counts["torn"] += 1
            self.report("warning", f"{self.path}: an unfinished last line was taken out")
        told: dict[Key, Told] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                reward = math.nan if row["reward"] is None else float(row["reward"])
                told[str(row["id"]), str(row["teacher"])] = Told(str(row["text"]), Finish(row["finish"]), reward)
            except (ValueError, LookupError, TypeError) as error:
                self.counts["unreadable"] += 1
                self.report("warning", f"{self.path}:{number}: no trace: {error!r}")
        return told


def _seed(prompt: Prompt, teacher: str) -> int:
    """Another one for each teacher."""
    return (prompt.seed + zlib.crc32(teacher.encode())) % 2**63
