"""What a run needs to go on, committed by one rename (rlkd/store).

    checkpoints/step-000120/
        learner/       the learner's own files (weights, optimizer, random state)
        hf/            the same weights as a Hugging Face folder; probe.json: log-probs to compare a copy with
        driver.json    step, last knobs and metrics, ledger, curriculum
        MANIFEST.json  every file's size and blake3; digests of the learner's parts, versions, topology

A checkpoint that was loaded is compared, part by part, with the digests of when it was saved (level L1).
"""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.core.errors import CheckpointError
from rlkd.core.interval import interval_s
from rlkd.core.ports import Curriculum, Learner
from rlkd.core.types import Prompt
from rlkd.store.store import Found, Store
from rlkd.train.ledger import Ledger

NEW_DATA = "the data was changed"


@dataclass(frozen=True)
class State:
    """The driver's part of a checkpoint."""

    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


@dataclass
class Checkpoints:
    store: Store
    every: int | None = 0  # steps; 0: only after the last one; None: by time
    between_failures_s: float = 4 * 3600.0  # mean time, for `every=None`
    facts: Mapping[str, Any] = field(default_factory=dict)  # committed with every checkpoint
    # given a checkpoint's facts: True if it is of other prompts, and that is accepted; raises for one of another run
    accept: Callable[[Mapping[str, Any]], bool] = lambda _: False
    aside: Callable[[int], list[int]] = lambda _: []  # rename the checkpoints here after this step; their steps
    promised: int | None = None  # the newest step that earlier attempts say they saved
    clock: Callable[[], float] = time.monotonic
    save_s: float | None = None  # measured, smoothed
    step: int | None = None  # of the newest checkpoint, loaded or saved

    def __post_init__(self) -> None:
        self._since = self.clock()

    def due(self, step: int, steps: int) -> bool:
        if step == steps or self.every == 0:
            return step == steps
        if self.every is not None:
            return step % self.every == 0
        return self.clock() - self._since >= self.interval_s

    @property
    def interval_s(self) -> float:
        """Seconds between saves that lose the least work."""
        return interval_s(self.save_s, self.between_failures_s)

    async def restore(
        self, learner: Learner, curriculum: Curriculum, prompt: Callable[[str, int], Prompt], step: int | None = None
    ) -> State:
        """Load the newest whole checkpoint, or that of `step`; the fresh state if there never was one.

        CheckpointError (exit 7) if there were some and none can be used, or if what is loaded is not what was saved.
        """
        found = await asyncio.to_thread(self.store.newest if step is None else lambda: self.store.at(step))
        if found is None:
            self._nothing_lost()
            return State()
        new_data = self.accept(found.manifest.facts)
        if step is not None:
            await self._go_back(step)
        saved = _read(found.path)
        ledger = Ledger.load(saved["ledger"], _unknown if new_data else prompt)
        state = State(saved["step"], _numbers(saved["last"]), ledger)
        if not new_data:  # else it stays at the beginning of the new data
            curriculum.load_state_dict(saved["curriculum"])
        digests = await learner.load(str(found.path / "learner"))
        own = _digests(_driver(state, curriculum))
        if new_data:
            del own["driver/curriculum"]
            ledger.drop_pending(state.step, NEW_DATA)
        self._compare(found, {**digests, **own})
        self.step, self._since = state.step, self.clock()
        return state

    async def _go_back(self, step: int) -> None:
        """What comes after `step` is no checkpoint any more: in the remote store first, or an interruption in between
        would bring it back from there."""
        there, here = await asyncio.to_thread(self.store.withdraw_after, step), self.aside(step)
        if gone := sorted({*there, *here}):
            text = f"back to step {step}: the checkpoints of steps {', '.join(map(str, gone))} were renamed .old-…"
            self.store.tell("resume", text)

    def _nothing_lost(self) -> None:
        if self.promised is not None:
            raise CheckpointError(
                "RLKD-K107",
                f"an earlier attempt saved step {self.promised}, and there is no checkpoint any more",
                where=str(self.store.directory),
                fix="bring the checkpoints back (a volume that is not mounted?), or begin anew with another name=…",
            )

    def _compare(self, found: Found, loaded: Mapping[str, str]) -> None:
        """Level L1. A learner of other ranks or another ZeRO stage has other parts: those are not compared."""
        saved = found.manifest.facts.get("digests", {})
        if other := sorted(name for name in saved.keys() & loaded.keys() if saved[name] != loaded[name]):
            raise CheckpointError(
                "RLKD-K105",
                f"what was loaded is not what was saved: {', '.join(other)}",
                where=str(found.path),
                fix="report this; move this checkpoint away to use the one before it",
            )

    async def save(
        self, state: State, learner: Learner, curriculum: Curriculum, score: float | None = None
    ) -> Path | None:
        """Write and commit a whole step; its folder, or None if it is saved already. OSError if there is no room, and
        whatever `learner.save` raises; then nothing has changed."""
        if state.step == self.step:
            return None
        began, driver = (
            self.clock(),
            _driver(state, curriculum),
        )  # before anything waits: prompts are admitted meanwhile
        draft = await asyncio.to_thread(self.store.draft, state.step)
        try:
            digests = {**await learner.save(str(draft / "learner")), **_digests(driver)}
            await learner.export(str(draft / "hf"))
            (draft / "driver.json").write_text(json.dumps(driver, allow_nan=False))
            facts = {**self.facts, "digests": digests, "score": score, "saved": time.time()}
            path = await asyncio.to_thread(self.store.commit, draft, state.step, facts)
        except BaseException:
            self.store.discard(draft)
            raise
        self.step, self._since = state.step, self.clock()
        took = self._since - began
        self.save_s = took if self.save_s is None else 0.5 * (self.save_s + took)
        return path


def _unknown(prompt_id: str, seed: int) -> Prompt:
    """In the place of a prompt that the new data does not have."""
    return Prompt(prompt_id, np.zeros(0, np.int32), "", seed=seed)


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads((path / "driver.json").read_text())
        int(saved["step"]), dict(saved["last"]), dict(saved["ledger"]), dict(saved["curriculum"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            "RLKD-K001",
            f"cannot read the checkpoint: {e!r}",
            where=str(path / "driver.json"),
            fix="move this checkpoint away to use the one before it, or start with another name=…",
        ) from e
    return dict(saved)


def _driver(state: State, curriculum: Curriculum) -> dict[str, Any]:
    """What driver.json holds. Infinities and NaN are written as texts: strict json does not know them."""
    last = {name: float(value) if math.isfinite(value) else str(float(value)) for name, value in state.last.items()}
    ledger = state.ledger.state_dict()
    return {"step": state.step, "last": last, "ledger": ledger, "curriculum": curriculum.state_dict()}


def _digests(driver: Mapping[str, Any]) -> dict[str, str]:
    """Of its parts."""
    return {
        f"driver/{name}": hashlib.blake2b(json.dumps(part, sort_keys=True).encode(), digest_size=16).hexdigest()
        for name, part in driver.items()
    }


def _numbers(written: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) for name, value in written.items()}
