"""`rlkd ckpt ls|verify|pin|unpin|prune RUN`: looking at a run's checkpoints, and deleting some, also while it runs.

Each function returns its result as plain values, `text` for people; `exit` where the exit code is not 0.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlkd.core.errors import NO_CHECKPOINT, CheckpointError
from rlkd.store.disk import in_words
from rlkd.store.folder import some
from rlkd.store.manifest import MANIFEST
from rlkd.store.retention import Keep, special
from rlkd.store.store import Store


def ls(run: Path) -> dict[str, Any]:
    """The run's checkpoints, oldest first, what is kept of them and why. Files are not verified."""
    store = opened(run)
    there, keep, pins = store.manifests(), _keep(run), store.pins()
    scores = {step: m.score for step, m in there.items()}
    reasons = {
        "newest": set(list(there)[-keep.newest :]),
        f"every {keep.every}": special(scores, Keep(every=keep.every), ()),
        f"best {keep.best}": special(scores, Keep(best=keep.best), ()),
        "pinned": special(scores, Keep(), pins),
    }
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "bytes": manifest.size,
            "files": len(manifest.files),
            "saved": (store.path(step) / MANIFEST).stat().st_mtime,
            "score": manifest.score,
            "kept": [why for why, steps in reasons.items() if step in steps],
        }
        for step, manifest in there.items()
    ]
    unreadable = [step for step in store.there() if step not in there]
    lines = _table(
        [
            ("step", "size", "files", "saved", "score", "kept as"),
            *(
                (
                    str(row["step"]),
                    in_words(row["bytes"]),
                    str(row["files"]),
                    time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved"])),
                    "—" if row["score"] is None else f"{row['score']:.4g}",
                    ", ".join(row["kept"]) or "—",
                )
                for row in rows
            ),
        ]
    )
    lines += [f"step {step} has no readable manifest" for step in unreadable]
    lines += [f"damaged, moved away: .bad/{name}" for name in store.bad()]
    return {"checkpoints": rows, "unreadable": unreadable, "bad": store.bad(), "text": "\n".join(lines)}


def verify(run: Path, step: int | None = None) -> dict[str, Any]:
    """Reads every byte of the run's checkpoints, or of one. Nothing is moved. `exit` is 7 if one is damaged."""
    store = opened(run)
    steps = store.there() if step is None else [step]
    if step is not None and step not in store.there():
        raise _missing(store, step)
    found, lines = [], []
    for each in steps:
        try:
            wrong = store.verify(each)
        except OSError as e:
            raise CheckpointError(
                "RLKD-K014", f"cannot be read: {e.strerror}", where=str(e.filename), fix="mend the access"
            ) from e
        found.append({"step": each, "whole": not wrong, "problems": wrong})
        lines.append(f"step {each}: " + (some(wrong) if wrong else "whole"))
    whole = all(row["whole"] for row in found)
    code = {} if whole else {"exit": NO_CHECKPOINT}
    return {"checkpoints": found, "whole": whole, **code, "text": "\n".join(lines) or "there are no checkpoints"}


def pin(run: Path, step: int) -> dict[str, Any]:
    """Never delete this one."""
    opened(run).pin(step)
    return {"step": step, "pinned": True, "text": f"step {step} is pinned: it is not deleted"}


def unpin(run: Path, step: int) -> dict[str, Any]:
    """It may be deleted again."""
    was = opened(run).unpin(step)
    text = f"step {step} is no longer pinned" if was else f"step {step} was not pinned"
    return {"step": step, "pinned": False, "was": was, "text": text}


def prune(
    run: Path, last: int | None = None, every: int | None = None, best: int | None = None, dry: bool = False
) -> dict[str, Any]:
    """Delete what the run's settings do not keep, or other numbers given here. With `dry` it is only said what."""
    given: Mapping[str, int | None] = {"last": last, "every": every, "best": best}
    keep = Keep(**{**vars(_keep(run)), **{k: v for k, v in given.items() if v is not None}})
    told: list[str] = []
    store = opened(run, keep, lambda _, text, **__: told.append(text))
    try:
        gone = store.excess(mend=False) if dry else store.prune()
    except OSError as e:
        raise CheckpointError(
            "RLKD-K014", f"cannot be read: {e.strerror}", where=str(e.filename), fix="nothing was deleted"
        ) from e
    left = [step for step in store.steps() if step not in gone]
    verb = "would be deleted" if dry else "deleted"
    text = [*told, f"{verb}: {_listed(gone)}", f"kept: {_listed(left)}"]
    return {"deleted": gone, "kept": left, "dry": dry, "told": told, "text": "\n".join(text)}


def opened(run: Path, keep: Keep | None = None, tell: Any = None) -> Store:
    """The run's store. CheckpointError RLKD-K017 if the run has none."""
    directory = run / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            "RLKD-K017", "there are no checkpoints", where=str(directory), fix="give the folder of a run that saved one"
        )
    return Store(directory, keep or Keep(), **({"tell": tell} if tell else {}))


def _keep(run: Path) -> Keep:
    """As the run's own settings say. Defaults where it has none; CheckpointError RLKD-K018 if they cannot be read."""
    path = run / "config.yaml"
    try:
        settings = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("checkpoint") or {}
        names = {"last": "keep", "every": "keep_every", "best": "keep_best"}
        return Keep(**{key: int(settings[name]) for key, name in names.items() if name in settings})
    except FileNotFoundError:
        return Keep()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise CheckpointError(
            "RLKD-K018",
            f"what the run keeps cannot be read: {e}",
            where=str(path),
            fix="mend that file; nothing was deleted",
        ) from e


def _missing(store: Store, step: int) -> CheckpointError:
    return CheckpointError(
        "RLKD-K012",
        f"there is no checkpoint of step {step}",
        where=str(store.directory),
        fix=f"there are: {_listed(store.there())}",
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns aligned: numbers to the right, the last to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([*(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)), row[-1]]) for row in rows]
