"""A run goes on with another one's weights, optimizer, ledger and place in the data: `rlkd fork`, and PBT's trials.

The other's checkpoint becomes one of this run, verified byte by byte; of the other nothing is changed. This run's own
later ones are deleted (PBT), for nobody goes back to them. `run.json` keeps the lineage: at which step, from whom, the
digest of what was copied, with which settings, after how many attempts. Every checkpoint says which attempt wrote it:
one of an attempt from before the copy is no work of the copy, however late it was committed.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlkd import attempt
from rlkd import export as exported
from rlkd.config.contradictions import NAME
from rlkd.config.load import load
from rlkd.core.errors import CheckpointError, ConfigError, PreflightError
from rlkd.lease import held
from rlkd.prove import config_of
from rlkd.report.files import as_json, plain, replace_file
from rlkd.staged import INDEX
from rlkd.store.folder import Found
from rlkd.store.manifest import MANIFEST
from rlkd.store.store import Store

LEASE_S = 60.0  # on the new folder while it is made
TRIES = 3  # the other run goes on meanwhile, and may delete what is being copied


@dataclass(frozen=True)
class Origin:
    """What is copied: a checkpoint of the run in this folder, or, if that is deleted by now, the next one after it."""

    run: Path
    step: int


def fork(run: Path, name: str, step: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """`rlkd fork`: make `name`, beside `run`, a run that begins with its checkpoint of `step` (None: the newest). It
    has the other's recipe, and goes on like any run. CheckpointError, ConfigError or PreflightError if that cannot be;
    then there is no such folder afterwards."""
    run, step = run.resolve(), _asked(run, name, step)
    folder = run.parent / name
    _refuse_if_taken(folder)
    made = False
    try:
        with held(folder, LEASE_S, say, attempt.lost):
            _refuse_if_taken(folder)
            made = True
            step = forked(Origin(run, step), folder, {})
            record = attempt.read_record(folder) | {"fingerprint": attempt.read_record(run).get("fingerprint", {})}
            replace_file(folder / attempt.RECORD, as_json(record) + "\n")
            shutil.copy2(config_of(run), folder)
    except BaseException:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    again = f"rlkd train RECIPE name={name}    with its recipe, or\nrlkd resume {folder}    with {run.name}'s settings"
    text = f"{folder} begins at step {step} of {run.name}. It goes on with\n{again}"
    return {"run": str(folder), "from": str(run), "step": step, "digest": record["lineage"][-1]["digest"], "text": text}


def _asked(run: Path, name: str, step: int | None) -> int:
    """The step that is to be copied, if a run of this name can be made of it."""
    if not NAME.fullmatch(name):
        what = f"a run cannot be called {name!r}"
        raise ConfigError("RLKD-C417", what, where="command line", fix="letters, digits, `.`, `_` and `-`, at most 100")
    if (run / INDEX).exists():
        stages = ", ".join(str(run / stage) for stage in json.loads((run / INDEX).read_text())["stages"])
        fix = f"fork the folder of one stage: {stages}"
        raise PreflightError("RLKD-E136", "a run with stages cannot be forked as a whole", where=str(run), fix=fix)
    settings = yaml.safe_load(config_of(run).read_text(encoding="utf-8")) or {}
    if (settings.get("checkpoint") or {}).get("remote") is not None:  # the run would go on with what is there
        from rlkd.job import refuse_remote  # imports Ray, which a fork does not need else

        refuse_remote(load(config_of(run), [f"name={name}"]))
    return exported.step_there(run, step)


def _refuse_if_taken(folder: Path) -> None:
    own = folder.is_dir() and not folder.is_symlink() and all(p.name.startswith(".lease") for p in folder.iterdir())
    if os.path.lexists(folder) and not own:
        what = "there is a folder of this name already"
        raise PreflightError("RLKD-E165", what, where=str(folder), fix="give the new run another name")


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
    found = _copied(origin, Store(folder / "checkpoints"), told)
    step = found.manifest.step
    entry = {**told, "step": step, "digest": found.manifest.digest}
    entry |= {"attempts": len(record["attempts"]), "time": time.time()}
    record["lineage"] = [*lineage, entry]
    replace_file(folder / attempt.RECORD, as_json(record) + "\n")
    return step


def since(folder: Path) -> list[int]:
    """The steps that this run saved after it became a copy, oldest first."""
    last = attempt.read_record(folder)["lineage"][-1]
    there, before = Store(folder / "checkpoints").manifests(), last.get("attempts", -1)  # -1: of an older rlkd
    return [step for step, m in there.items() if step > last["step"] and int(m.facts.get("attempt") or 0) > before]


def _copied(origin: Origin, store: Store, told: Mapping[str, Any]) -> Found:
    """Commit a copy of the other's checkpoint, and delete this run's own from there on; what was copied."""
    donor = Store(origin.run / "checkpoints")
    for left in reversed(range(TRIES)):
        found = _found(donor, origin.step)
        step = found.manifest.step
        draft = store.draft(step, found.manifest.size)
        try:
            shutil.copytree(found.path, draft, dirs_exist_ok=True, copy_function=_link_or_copy)
            (draft / MANIFEST).unlink()
            lineage = {**told, "step": step, "digest": found.manifest.digest}
            facts = {**found.manifest.facts, "attempt": None, "run": store.directory.parent.name, "lineage": lineage}
            for own in (s for s in store.there() if s >= step):
                store.drop(own)
            store.commit(draft, step, facts)
            return found
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
