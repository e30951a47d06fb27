"""PBT: a trial goes on with another one's weights, optimizer, ledger and place in the data, and other settings.

The other's checkpoint becomes one of this run, verified byte by byte; this run's own later ones are deleted, for nobody
goes back to them. `run.json` keeps the lineage: at which step, from whom, with which settings, after how many attempts.
Every checkpoint says which attempt wrote it: one of an attempt from before the copy is no work of the copy, however
late it was committed.
"""

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd import attempt
from rlkd import export as exported
from rlkd.core.errors import CheckpointError
from rlkd.report.files import as_json, plain, replace_file
from rlkd.store.folder import Found
from rlkd.store.manifest import MANIFEST
from rlkd.store.store import Store

TRIES = 3  # the other run goes on meanwhile, and may delete what is being copied


@dataclass(frozen=True)
class Origin:
    """What is copied: a checkpoint of the run in this folder, or, if that is deleted by now, the next one after it."""

    run: Path
    step: int


def forked(origin: Origin, folder: Path, values: Mapping[str, Any]) -> int:
    """Make `folder` a run that goes on where `origin` is; the step. The same call again changes nothing. The caller
    holds the folder's lease: who is still writing there would undo it.

    CheckpointError if the other run has no such checkpoint any more, or a damaged one."""
    record = attempt.read_record(folder)
    lineage = list(record.get("lineage", []))
    told = {"from": str(origin.run), "asked": origin.step, "values": plain(dict(values))}
    if lineage and {key: lineage[-1][key] for key in told} == told:
        step = int(lineage[-1]["step"])
        if since(folder) or step in exported.checkpoints(folder):  # else it was pruned by who came before
            return step
    step = _copied(origin, Store(folder / "checkpoints"), told)
    entry = {**told, "step": step, "attempts": len(record["attempts"]), "time": time.time()}
    record["lineage"] = [*lineage, entry]
    replace_file(folder / attempt.RECORD, as_json(record) + "\n")
    return step


def since(folder: Path) -> list[int]:
    """The steps that this run saved after it became a copy, oldest first."""
    last = attempt.read_record(folder)["lineage"][-1]
    there, before = Store(folder / "checkpoints").manifests(), last.get("attempts", -1)  # -1: of an older rlkd
    return [step for step, m in there.items() if step > last["step"] and int(m.facts.get("attempt") or 0) > before]


def _copied(origin: Origin, store: Store, told: Mapping[str, Any]) -> int:
    """Commit a copy of the other's checkpoint, and delete this run's own from there on; its step."""
    donor = Store(origin.run / "checkpoints")
    for left in reversed(range(TRIES)):
        found = _found(donor, origin.step)
        step = found.manifest.step
        draft = store.draft(step, found.manifest.size)
        try:
            shutil.copytree(found.path, draft, dirs_exist_ok=True, copy_function=_link_or_copy)
            (draft / MANIFEST).unlink()
            facts = {**found.manifest.facts, "attempt": None, "run": store.directory.parent.name, "lineage": dict(told)}
            for own in (s for s in store.there() if s >= step):
                store.drop(own)
            store.commit(draft, step, facts)
            return step
        except (FileNotFoundError, shutil.Error):
            store.discard(draft)
            if not left:
                raise
        except BaseException:
            store.discard(draft)
            raise
    raise AssertionError("not reached")


def _found(donor: Store, step: int) -> Found:
    """The checkpoint of this step, or the first after it, every file verified."""
    later = [s for s in donor.manifests() if s >= step]
    if not later:
        raise CheckpointError(
            "RLKD-K130",
            f"the run that is to be copied has no checkpoint of step {step} or later",
            where=str(donor.directory),
            fix="checkpoint.keep: more of them",
        )
    return donor.at(min(later))


def _link_or_copy(source: str, target: str) -> None:
    """A committed file never changes: on one file system a second name for it is enough."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
