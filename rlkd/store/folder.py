"""What is in a directory of checkpoints, and how things in it are verified, moved aside and deleted."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.core.errors import CheckpointError
from rlkd.core.faults import fault
from rlkd.store import manifest as manifests
from rlkd.store import names
from rlkd.store.disk import sync_directory
from rlkd.store.manifest import Manifest, OtherFormat, problems


@dataclass(frozen=True)
class Found:
    """A checkpoint of which every file was just verified."""

    path: Path
    manifest: Manifest


def quiet(kind: str, text: str, **fields: Any) -> None:
    """Tells nobody."""


@dataclass
class Folder:
    """`tell(kind, text, **fields)` hears of what went wrong and was put right, in the thread that calls a method."""

    directory: Path
    tell: Callable[..., None] = quiet

    def there(self) -> list[int]:
        """The steps of all that is called a checkpoint, whole or not, oldest first."""
        return sorted(s for p in self._entries() if (s := names.step_of(p.name)) is not None)

    def manifests(self) -> dict[int, Manifest]:
        """Checkpoints with a readable manifest of this format, oldest first; their files are not verified."""
        found = {}
        for step in self.there():
            try:
                manifest = manifests.read(self.path(step))
            except CheckpointError:
                continue
            if manifest.step == step:
                found[step] = manifest
        return found

    def steps(self) -> dict[int, Path]:
        """The folders of `manifests`."""
        return {step: self.path(step) for step in self.manifests()}

    def path(self, step: int) -> Path:
        return self.directory / names.of_step(step)

    def verify(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, a line each. Nothing is moved. OSError if it may not be read."""
        return self._verified(step)[1]

    def bad(self) -> list[str]:
        """Names in `.bad/`."""
        bad = self.directory / names.BAD
        return sorted(p.name for p in bad.iterdir()) if bad.is_dir() else []

    def pins(self) -> set[int]:
        """Steps that are never deleted."""
        pins = self.directory / names.PINS
        found = (names.step_of(p.name) for p in pins.iterdir()) if pins.is_dir() else ()
        return {step for step in found if step is not None}

    def pin(self, step: int) -> None:
        """Never delete this one. CheckpointError RLKD-K012 if it is not there."""
        if step not in self.manifests():
            raise self._not_there(step)
        self._mark_pinned(step)

    def unpin(self, step: int) -> bool:
        """It may be deleted again; whether it was pinned."""
        pin = self.directory / names.PINS / names.of_step(step)
        was = pin.exists()
        pin.unlink(missing_ok=True)
        return was

    def drop(self, step: int) -> bool:
        """Delete a checkpoint, pinned or not; whether that could be done: else it is told."""
        return self._delete(self.path(step))

    def _mark_pinned(self, step: int) -> None:
        pins = self.directory / names.PINS
        pins.mkdir(exist_ok=True)
        (pins / names.of_step(step)).touch()
        sync_directory(pins)

    def _verified(self, step: int) -> tuple[Found | None, list[str]]:
        """The checkpoint, or what is wrong with it. OSError, OtherFormat."""
        path = self.path(step)
        if path.is_symlink() or not path.is_dir():
            return None, ["it is no folder"]
        try:
            manifest = manifests.read(path)
        except OtherFormat:
            raise
        except CheckpointError as e:
            return None, [e.problems[0].what]
        if manifest.step != step:
            return None, [f"its manifest is of step {manifest.step}"]
        try:
            wrong = problems(path, manifest)
        except FileNotFoundError:
            wrong = ["a part of it went away meanwhile"]
        return (None, wrong) if wrong else (Found(path, manifest), [])

    def _set_aside(self, path: Path) -> str:
        """Move something damaged into `.bad/`; its new name, or the old one where it cannot be moved."""
        bad = self.directory / names.BAD
        try:
            bad.mkdir(exist_ok=True)
            number, target = 1, bad / path.name
            while os.path.lexists(target):
                number += 1
                target = bad / f"{path.name}-{number}"
            os.rename(path, target)
        except OSError as e:
            self.tell("store", f"{path.name} cannot be moved to {names.BAD}: {e}")
            return path.name
        return f"{names.BAD}/{target.name}"

    def _delete(self, path: Path) -> bool:
        """Rename, then delete: half of a checkpoint never has its name."""
        trash = self.directory / names.of_trash(path.name)
        try:
            os.rename(path, trash)
        except OSError as e:
            self.tell("store", f"{path.name} cannot be deleted: {e}")
            return False
        fault("commit.trash")
        self._remove(trash)
        return True

    def _remove(self, path: Path) -> None:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as e:
            if os.path.lexists(path):  # else another process was quicker
                self.tell("store", f"{path.name} cannot be deleted: {e}", path=str(path))

    def _empty_trash(self) -> list[str]:
        trash = [p for p in self._entries() if p.name.startswith(".trash-")]
        for path in trash:
            self._remove(path)
        return [p.name for p in trash]

    def _entries(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []

    def _not_there(self, step: int, what: str = "") -> CheckpointError:
        have = ", ".join(str(s) for s in self.manifests() if s != step) or "none"
        what = what or f"there is no checkpoint of step {step}"
        return CheckpointError("RLKD-K012", what, where=str(self.directory), fix=f"checkpoints of other steps: {have}")


def some(problems: list[str]) -> str:
    """The first three of a list."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
