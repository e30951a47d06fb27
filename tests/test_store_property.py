"""Random lives of a store: saves, pins, damage, crashes, deletions, new processes; against a model of what must be.

What must hold after each: the newest whole checkpoint is found; of the whole ones the two newest, the pinned, the best
and the multiples are there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlkd.core import faults
from rlkd.core.errors import CheckpointError
from rlkd.store import names
from rlkd.store.retention import Keep
from rlkd.store.store import Store
from tests.store_help import FILES, content, fill, flip, is_of
from tests.test_store_crash import AFTER, BEFORE

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the model is of files, not of the disk
LIVES = int(os.environ.get("RLKD_LIVES", 12))


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        self.keep = Keep(last=2, every=5, best=1)
        self.dead: set[str] = set()  # drafts of processes that crashed
        self.scores: dict[int, float | None] = {}  # of every whole checkpoint
        self.damaged: set[int] = set()  # steps whose folders are damaged, and still have their names
        self.pinned: set[int] = set()
        self.step = 0
        self.lost = False  # whether a checkpoint was ever damaged
        self.begin()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule()
    def begin(self) -> None:
        """A new process: the drafts of the one before are dead."""
        self.store = Store(self.root, self.keep)
        self.store.clean()

    @rule(score=st.none() | st.sampled_from([0.1, 0.5, 0.9]))
    def save(self, score: float | None) -> None:
        self.step += 1
        expected = self.protected({self.step: score})
        self.store.commit(fill(self.store.draft(self.step), self.step), self.step, {"score": score})
        self.scores[self.step] = score
        assert self.whole() == expected

    @rule(point=st.sampled_from([*BEFORE, *AFTER, "commit.trash"]), score=st.none() | st.sampled_from([0.2, 0.9]))
    def crash(self, point: str, score: float | None) -> None:
        """The process dies while it saves; what it left on the disk is all there is."""
        self.step += 1
        expected = self.protected({} if point in BEFORE else {self.step: score})
        draft = fill(self.store.draft(self.step), self.step)
        os.environ["RLKD_FAULT"] = f"{point}=raise"
        faults._passed.clear()
        try:
            self.store.commit(draft, self.step, {"score": score})
        except RuntimeError:
            if point in BEFORE:
                self.dead.add(draft.name)
                self.step -= 1
            else:
                self.scores[self.step] = score
        else:  # there was nothing to delete
            assert point == "commit.trash"
            self.scores[self.step] = score
        finally:
            del os.environ["RLKD_FAULT"]
        assert self.whole() >= expected
        live = names.is_live
        names.is_live = lambda name: name not in self.dead and live(name)
        try:
            self.begin()
        finally:
            names.is_live = live

    @rule(nth=st.integers(0, 5), kind=st.sampled_from(["flip", "cut", "unlink", "extra", "manifest", "no manifest"]))
    def damage(self, nth: int, kind: str) -> None:
        there = sorted(self.scores, reverse=True)
        if nth >= len(there):
            return
        step = there[nth]
        path = self.root / names.of_step(step)
        file = path / sorted(FILES)[nth % 3]
        match kind:
            case "flip":
                flip(file)
            case "cut":
                os.truncate(file, 1)
            case "unlink":
                file.unlink()
            case "extra":
                (path / "x").touch()
            case "manifest":
                flip(path / "MANIFEST.json", at=0)
            case "no manifest":
                (path / "MANIFEST.json").unlink()
        del self.scores[step]
        self.damaged.add(step)
        self.lost = True

    @rule(latest=st.sampled_from([b"", b"step-000001\n", b"\xff"]))
    def garble_latest(self, latest: bytes) -> None:
        (self.root / "LATEST").write_bytes(latest)

    @rule(nth=st.integers(0, 4))
    def pin(self, nth: int) -> None:
        if nth < len(self.scores):
            step = sorted(self.scores)[nth]
            Store(self.root).pin(step)  # by another process
            self.pinned.add(step)

    @precondition(lambda self: self.pinned)
    @rule(nth=st.integers(0, 4))
    def unpin(self, nth: int) -> None:
        step = sorted(self.pinned)[nth % len(self.pinned)]
        assert self.store.unpin(step)
        self.pinned.discard(step)

    @rule(last=st.integers(0, 3))
    def prune(self, last: int) -> None:
        """By hand, beside the run."""
        expected = self.protected(last=max(2, last))
        Store(self.root, Keep(last, self.keep.every, self.keep.best)).prune()
        assert self.whole() == expected

    @rule()
    def newest(self) -> None:
        """As at the start of a run: what is damaged is moved away."""
        newest = max(self.scores, default=None)
        if newest is None and self.lost:
            with pytest.raises(CheckpointError, match="RLKD-K016"):
                self.store.newest()
            assert self.store.there() == []
        else:
            found = self.store.newest()
            assert (found.manifest.step if found else None) == newest
            assert max(self.store.there(), default=None) == newest
        self.step = max(self.scores, default=0)  # the run goes on from there
        self.damaged = {s for s in self.damaged if s <= self.step}

    def whole(self) -> set[int]:
        """The whole checkpoints on the disk, without the store's help."""
        found = set()
        for path in self.root.glob("step-*"):
            step = int(path.name.removeprefix("step-"))
            if step in self.scores and is_of(path, step):
                files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
                assert files == {*content(step), "MANIFEST.json"}
                found.add(step)
        return found

    def protected(self, new: Mapping[int, float | None] = MappingProxyType({}), last: int = 2) -> set[int]:
        """Of the whole ones, and of a new one, those that may not be deleted. The others are."""
        whole = sorted({*self.whole(), *new})
        readable = {s: self.scores[s] for s in whole if s in self.scores} | dict(new)
        for step in self.damaged:  # one that is damaged may be the best all the same
            try:
                manifest = json.loads((self.root / names.of_step(step) / "MANIFEST.json").read_text())
                readable[step] = manifest["facts"]["score"]
            except (OSError, ValueError):
                pass
        scored = [(score, step) for step, score in readable.items() if score is not None]
        best = {max(scored)[1]} if scored else set()
        return {*whole[-last:], *(self.pinned & set(whole)), *(best & set(whole)), *(s for s in whole if s % 5 == 0)}

    @invariant()
    def the_newest_whole_one_is_found(self) -> None:
        self.scores = {step: self.scores[step] for step in sorted(self.whole())}
        if self.scores:
            looked = self.store.newest(mend=False)
            assert looked is not None
            assert looked.manifest.step == max(self.scores)


Life.TestCase.settings = settings(max_examples=LIVES, stateful_step_count=30, deadline=None)
TestLife = pytest.mark.faults("F29", "F23", "F24", "F25")(Life.TestCase)
