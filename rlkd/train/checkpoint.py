"""What a run needs to go on, committed by one rename.

    checkpoints/step-000120/
        learner/       the learner's own files (weights, optimizer, random state)
        hf/            the same weights as a Hugging Face folder; probe.json: log-probs to compare a copy with
        driver.json    step, last knobs and metrics, owed prompts, curriculum
        COMPLETE       written last, inside the temporary directory; then the directory is renamed

A directory without COMPLETE never has the final name, and is ignored.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlkd.core.errors import CheckpointError
from rlkd.core.ports import Curriculum, Learner


@dataclass(frozen=True)
class State:
    """The driver's part of a checkpoint."""

    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict)
    owed: list[tuple[int, str, int]] = field(default_factory=list)  # ticket, prompt id, seed
    next_ticket: int = 0


@dataclass
class Checkpoints:
    directory: Path
    every: int = 0  # steps; 0: only after the last one
    keep: int = 2

    def due(self, step: int, steps: int) -> bool:
        return step == steps or bool(self.every and step % self.every == 0)

    def complete(self) -> list[Path]:
        """Checkpoints that can be loaded, oldest first."""
        return sorted(p.parent for p in self.directory.glob("step-*/COMPLETE"))

    async def restore(self, learner: Learner, curriculum: Curriculum) -> State:
        """Load the newest complete checkpoint into learner and curriculum; the fresh state if there is none."""
        found = self.complete()
        if not found:
            return State()
        path = found[-1] / "driver.json"
        try:
            saved = json.loads(path.read_text())
            state = State(saved["step"], saved["last"], [tuple(o) for o in saved["owed"]], saved["next_ticket"])
            curriculum.load_state_dict(saved["curriculum"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(
                "RLKD-K001",
                f"cannot read the checkpoint: {e!r}",
                where=str(path),
                fix="move this checkpoint away to use the one before it, or start with another name=…",
            ) from e
        await learner.load(str(found[-1] / "learner"))
        return state

    async def save(self, state: State, learner: Learner, curriculum: Curriculum) -> str:
        """Write a checkpoint of a whole step; its path. An existing one of the same step is left as it is."""
        final = self.directory / f"step-{state.step:06d}"
        if final.exists():
            return str(final)
        temporary = self.directory / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        driver = {
            "step": state.step,
            "last": dict(state.last),
            "owed": state.owed,
            "next_ticket": state.next_ticket,
            "curriculum": curriculum.state_dict(),
        }
        await learner.save(str(temporary / "learner"))
        await learner.export(str(temporary / "hf"))
        _write(temporary / "driver.json", json.dumps(driver))
        _write(temporary / "COMPLETE", "")
        os.rename(temporary, final)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)
        return str(final)


def _write(path: Path, text: str) -> None:
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
