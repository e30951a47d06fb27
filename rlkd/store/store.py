"""A directory of checkpoints: written whole or not at all, verified before use, deleted last.

    draft = store.draft(130)          write into it, then
    store.commit(draft, 130, facts)   hash → manifest → rename → LATEST → retention; a crash leaves the one before
    store.newest()                    the newest of which every byte is as it was written

One process writes (it has the run's lease); others may read, pin and prune meanwhile.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkd.core.errors import CheckpointError
from rlkd.core.faults import fault
from rlkd.store import manifest as manifests
from rlkd.store import names
from rlkd.store.disk import in_words, sync_directory, write_part
from rlkd.store.fetch import fetch
from rlkd.store.folder import Folder, Found, quiet, some
from rlkd.store.manifest import Manifest, written
from rlkd.store.remote import Remote
from rlkd.store.retention import AT_LEAST, Keep, special
from rlkd.store.upload import Uploads

ROOM = 1.1  # × the last checkpoint's size must be free before the next is begun


class Store(Folder):
    """With `remote`, every commit is copied there in the background, and `newest` looks there too."""

    def __init__(
        self,
        directory: Path,
        keep: Keep = Keep(),  # noqa: B008 - frozen
        tell: Callable[..., None] = quiet,
        remote: Remote | None = None,
    ) -> None:
        super().__init__(directory, tell)
        self.keep, self.remote = keep, remote
        self._uploads = Uploads(remote, keep, self.pins) if remote is not None else None

    # --- writing

    def draft(self, step: int, size: int | None = None) -> Path:
        """A new empty folder to write the checkpoint of `step` into. `size`: bytes it will take; None: as the last one.

        OSError ENOSPC unless 1.1 times that is free: what is there is never given up for what may not fit.
        """
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self.directory.parent)
        if size is None:
            there = self.manifests()
            size = there[max(there)].size if there else 0
        if self._free() < ROOM * size:
            self._empty_trash()
        if (free := self._free()) < ROOM * size:
            what = f"a checkpoint needs {in_words(ROOM * size)}, and {in_words(free)} are free"
            raise OSError(errno.ENOSPC, what, str(self.directory))
        draft = self.directory / names.of_draft(step)
        draft.mkdir()
        return draft

    def commit(self, draft: Path, step: int, facts: Mapping[str, Any]) -> Path:
        """Make a draft the checkpoint of `step`; its path. `facts` are committed with it; a number `score` ranks it.

        Until this returns or fails the checkpoints before are untouched. OSError or ValueError (see `written`): nothing
        is committed, `discard` the draft. CheckpointError RLKD-K013 if there is one of this step.
        """
        self._check_draft(draft)
        if os.path.lexists(self.path(step)):
            raise CheckpointError(
                "RLKD-K013",
                f"there is a checkpoint of step {step} already",
                where=str(self.path(step)),
                fix="it was not touched; move it away to write another",
            )
        manifest = written(draft, step, facts)
        fault("commit.before_manifest")
        self._publish(draft, manifest)
        self._note_latest(step)
        if self._uploads is not None:
            self._uploads.put(self.path(step), manifest)
        self.news()
        try:
            self.prune(step)
        except (OSError, CheckpointError) as e:
            self.tell("store", f"no old checkpoint is deleted: {e}")
        return self.path(step)

    def discard(self, draft: Path) -> None:
        """Delete a draft that will not be committed. What cannot be deleted is told, and left for `clean`.

        A commit that still runs in another thread fails, or was quicker; it never commits half of it.
        """
        self._check_draft(draft)
        if draft.is_dir():
            self._delete(draft)

    def clean(self) -> list[str]:
        """Delete what dead processes left half-written or half-deleted; the names. Live processes' drafts stay."""
        left = [p for p in self._entries() if p.name.startswith(".tmp-") and not names.is_live(p.name)]
        for path in left:
            self._remove(path)
        return sorted([p.name for p in left] + self._empty_trash())

    # --- reading

    def newest(self, mend: bool = True) -> Found | None:
        """The newest checkpoint of which every file verifies, here or in the remote store; None if there never was one.

        A damaged one on the way is moved to `.bad/` and told; without `mend` nothing is moved or fetched.
        CheckpointError RLKD-K016 if there were checkpoints and none can be used, RLKD-K014 if they cannot be read,
        RLKD-K011 for one of a newer rlkd, RLKD-K015 if only the remote store could know.
        """
        damaged: dict[str, list[str]] = {}
        with self._access():
            found = self._newest_here(mend, damaged)
            if self.remote is not None and mend:
                newer = self._newest_there(self.remote, found, damaged)
                if newer is None and found is not None and self._uploads is not None:
                    self._uploads.put(found.path, found.manifest)  # in case the process died before it was there
                found = newer or found
        for name, wrong in damaged.items():
            instead = f"step {found.manifest.step} is used instead" if found else "there is none to use instead"
            self.tell("store", f"{name} is damaged: {some(wrong)}; {instead}", checkpoint=name, problems=wrong)
        if found is None and (damaged or self.bad()):
            raise self._none_left(damaged)
        return found

    def at(self, step: int) -> Found:
        """The checkpoint of one step, every file verified. CheckpointError RLKD-K012 if it is not there or damaged,
        RLKD-K011 or RLKD-K014 as `newest`."""
        with self._access():
            if not os.path.lexists(self.path(step)):
                raise self._not_there(step)
            found, wrong = self._verified(step)
            if found is None:
                raise self._not_there(step, f"the checkpoint of step {step} is damaged: {some(wrong)}")
        return found

    # --- keeping

    def excess(self, fresh: int | None = None, mend: bool = True) -> list[int]:
        """The steps that `keep` does not want, oldest first. `fresh` was written just now and is not read again.

        Nothing is in excess before the two newest that stay have been read and are whole: a damaged one is told, does
        not count, and with `mend` is moved to `.bad/`. OSError if they may not be read.
        """
        there = self.manifests()
        stay = special({step: manifest.score for step, manifest in there.items()}, self.keep, self.pins())
        if len(there) <= self.keep.newest or not there.keys() - stay:
            return []
        newest: list[int] = []
        for step in sorted(there, reverse=True):
            if len(newest) == self.keep.newest:
                break
            wrong = [] if step == fresh or len(newest) >= AT_LEAST else self.verify(step)
            if wrong and os.path.lexists(self.path(step)):
                name = self._set_aside(self.path(step)) if mend else names.of_step(step)
                self.tell("store", f"{name} is damaged: {some(wrong)}", checkpoint=name, problems=wrong)
            elif not wrong:
                newest.append(step)
        return [step for step in there if step not in stay and step < min(newest, default=0)]

    def prune(self, fresh: int | None = None) -> list[int]:
        """Delete what `keep` does not want; the steps. What cannot be deleted is told. See `excess`."""
        uploading = self._uploads.holding() if self._uploads else set[int]()
        return [step for step in self.excess(fresh) if step not in uploading and self._delete(self.path(step))]

    # --- the remote store

    def withdraw_after(self, step: int) -> list[int]:
        """The run goes on from `step` and writes the later ones again: those in the remote store are no checkpoints
        any more, or `newest` would fetch them; their steps. CheckpointError RLKD-K014 if that cannot be done."""
        if self.remote is None:
            return []
        with self._access():
            later = [other for other in self.remote.steps() if other > step]
            for other in reversed(later):
                self.remote.withdraw(other)
        return later

    def news(self) -> None:
        """Tell what the uploads in the background met since the last call. Cheap; once a step is often enough."""
        for text, fields in self._uploads.news() if self._uploads else ():
            self.tell("upload", text, **fields)

    def close(self, wait_s: int | float = 0.0) -> bool:
        """Wait for the uploads under way, `wait_s` at most; whether all is uploaded. What is not is told."""
        done = self._uploads.close(wait_s) if self._uploads else True
        self.news()
        return done

    # --- inside

    def _publish(self, draft: Path, manifest: Manifest) -> None:
        """The commit itself: the manifest into the draft, then the draft's name."""
        manifests.save(draft, manifest)
        fault("commit.before_rename")
        os.rename(draft, self.path(manifest.step))
        fault("commit.after_rename")
        try:
            sync_directory(self.directory)
        except OSError as e:  # it has its name: to call that a failure would make the next save of this step one
            self.tell("store", f"step {manifest.step} is saved, but a power failure now could still undo that: {e}")

    def _note_latest(self, step: int) -> None:
        """A hint for people. The checkpoint stands: whatever fails from here on is told, and nothing more."""
        fault("commit.before_latest")
        latest = self.directory / names.LATEST
        try:
            os.rename(write_part(latest, f"{names.of_step(step)}\n".encode()), latest)
        except OSError as e:
            self.tell("store", f"{names.LATEST} cannot be written: {e}")
        fault("commit.after_latest")

    def _newest_here(self, mend: bool, damaged: dict[str, list[str]]) -> Found | None:
        for step in reversed(self.there()):
            found, wrong = self._verified(step)
            if found is not None:
                return found
            path = self.path(step)
            if os.path.lexists(path):  # else another process pruned it meanwhile
                damaged[self._set_aside(path) if mend else path.name] = wrong
        return None

    def _newest_there(self, remote: Remote, here: Found | None, damaged: dict[str, list[str]]) -> Found | None:
        """What the remote store has that is newer, fetched. CheckpointError if it fails and there is nothing here."""
        try:
            got = fetch(remote, here.manifest.step if here else -1, self.draft, self.discard)
            pins = remote.pins() if got.manifest else set[int]()
        except OSError as e:
            if here is not None:
                self.tell("upload", f"{remote.url} cannot be read, step {here.manifest.step} of this disk is used: {e}")
                return None
            raise CheckpointError(
                "RLKD-K015",
                f"no checkpoint can be used here, and none can be fetched: {e}",
                where=remote.url,
                fix="mend the access and run the same command again, or begin anew without checkpoint.remote",
            ) from e
        damaged.update(got.damaged)
        if got.draft is None or got.manifest is None:
            return None
        step = got.manifest.step
        self._publish(got.draft, got.manifest)
        for pin in pins:  # also of steps that are only there
            self._mark_pinned(pin)
        self.tell("upload", f"step {step} was fetched from {remote.url}", step=step)
        return Found(self.path(step), got.manifest)

    @contextmanager
    def _access(self) -> Iterator[None]:
        """What may not be read is not damaged: then nothing is moved, and nothing older is used instead."""
        try:
            yield
        except OSError as e:
            raise CheckpointError(
                "RLKD-K014",
                f"the checkpoints cannot be read: {e.strerror or e}",
                where=str(e.filename or self.directory),
                fix="nothing was lost; mend the access and run the same command again",
            ) from e

    def _check_draft(self, draft: Path) -> None:
        if draft.parent != self.directory or not draft.name.startswith(".tmp-"):
            raise ValueError(f"{draft} is no draft of {self.directory}")

    def _free(self) -> int:
        return shutil.disk_usage(self.directory).free

    def _none_left(self, damaged: Mapping[str, list[str]]) -> CheckpointError:
        lost = [f"{name} ({some(wrong)})" for name, wrong in damaged.items()]
        lost += [f"{names.BAD}/{name}" for name in self.bad() if f"{names.BAD}/{name}" not in damaged]
        return CheckpointError(
            "RLKD-K016",
            f"there were checkpoints, and none of them can be used: {', '.join(lost)}",
            where=str(self.directory),
            fix="put a whole copy of one there, or begin anew with another name=…",
        )
