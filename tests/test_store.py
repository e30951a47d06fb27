"""The checkpoint store: what is committed, what is kept, what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from rlkd.core import faults
from rlkd.core.errors import CheckpointError
from rlkd.store import manifest as manifests
from rlkd.store import names
from rlkd.store.manifest import problems, read, written
from rlkd.store.retention import Keep, special
from rlkd.store.store import Store
from tests.store_help import FILES, Told, child, fill, flip, is_of, saved

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints", tell=Told())


def told(store: Store) -> str:
    assert isinstance(store.tell, Told)
    return store.tell.text


# --- committing


def test_what_is_committed_is_found_again(store: Store) -> None:
    assert store.newest() is None
    path = saved(store, 1, score=0.5, numbers={2: 1, 10: 2}, none=float("nan"))
    found = store.newest()
    assert found is not None
    assert found.path == path == store.directory / "step-000001"
    assert is_of(path, 1)
    assert found.manifest.facts == {"of": 1, "score": 0.5, "numbers": {"2": 1, "10": 2}, "none": None}
    assert {f.path for f in found.manifest.files} == FILES.keys()
    assert (
        found.manifest.size
        == sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) - (path / "MANIFEST.json").stat().st_size
    )
    assert (store.directory / "LATEST").read_text() == "step-000001\n"
    assert sorted(os.listdir(store.directory)) == ["LATEST", "step-000001"]
    assert told(store) == ""


def test_a_commit_that_has_its_name_has_not_failed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(directory: Path) -> None:
        raise OSError(errno.EIO, "input/output error", str(directory))

    draft = fill(store.draft(1), 1)
    monkeypatch.setattr("rlkd.store.store.sync_directory", fails)
    store.commit(draft, 1, {})
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 1
    assert "step 1 is saved, but a power failure now could still undo that" in told(store)


def test_a_step_is_found_by_its_number(store: Store) -> None:
    saved(store, 1)
    saved(store, 2)
    assert is_of(store.at(1).path, 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3[\s\S]*other steps: 1, 2") as caught:
        store.at(3)
    assert caught.value.exit_code == 7
    flip(store.at(1).path / "driver.json")
    with pytest.raises(CheckpointError, match=r"step 1 is damaged: driver.json: its content was changed[\s\S]*: 2"):
        store.at(1)
    assert store.there() == [1, 2]  # looking moves nothing


def test_a_commit_does_not_touch_one_that_is_there(store: Store) -> None:
    saved(store, 1)
    draft = fill(store.draft(1), 5)
    with pytest.raises(CheckpointError, match="RLKD-K013"):
        store.commit(draft, 1, {})
    assert is_of(store.at(1).path, 1)
    assert draft.is_dir()
    store.discard(draft)
    assert not draft.exists()


def test_only_a_draft_of_this_store_is_committed_or_discarded(store: Store, tmp_path: Path) -> None:
    saved(store, 1)
    for path in (tmp_path / ".tmp-x", store.directory / "step-000001", store.directory / ".tmp-x" / ".."):
        with pytest.raises(ValueError, match="no draft"):
            store.discard(path)
        with pytest.raises(ValueError, match="no draft"):
            store.commit(path, 2, {})
    assert is_of(store.at(1).path, 1)


def test_a_commit_that_failed_can_be_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = fill(store.draft(1), 1)
    for point in ("commit.after_part", "commit.before_rename"):
        monkeypatch.setenv("RLKD_FAULT", f"{point}=raise")
        faults._passed.clear()
        with pytest.raises(RuntimeError, match=point):
            store.commit(draft, 1, {})
    monkeypatch.delenv("RLKD_FAULT")
    assert is_of(store.commit(draft, 1, {}), 1)
    assert store.newest() is not None


@pytest.mark.faults("F23")
def test_a_draft_that_is_discarded_while_it_is_committed_never_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that is cancelled: its thread still hashes while the draft is deleted."""
    hashed, gone, failed = threading.Event(), threading.Event(), []
    whole = written

    def slow(*args: Any) -> Any:
        manifest = whole(*args)
        hashed.set()
        assert gone.wait(20)
        return manifest

    def commit() -> None:
        try:
            store.commit(draft, 1, {})
        except FileNotFoundError as e:
            failed.append(e)

    monkeypatch.setattr("rlkd.store.store.written", slow)
    draft = fill(store.draft(1), 1)
    thread = threading.Thread(target=commit)
    thread.start()
    assert hashed.wait(20)
    store.discard(draft)
    gone.set()
    thread.join(20)
    assert failed
    assert os.listdir(store.directory) == []


@pytest.mark.parametrize("kind", ["link", "link to a folder", "pipe"])
@pytest.mark.faults("F30")
def test_a_draft_with_something_else_than_files_is_refused(store: Store, tmp_path: Path, kind: str) -> None:
    draft = fill(store.draft(1), 1)
    (tmp_path / "secret").mkdir()
    if kind == "pipe":
        os.mkfifo(draft / "x")
    else:
        (draft / "x").symlink_to(tmp_path / "secret" if "folder" in kind else "/etc/passwd")
    with pytest.raises(ValueError, match="a checkpoint holds files only"):
        store.commit(draft, 1, {})
    assert store.newest() is None


def test_facts_must_be_json(store: Store) -> None:
    with pytest.raises(ValueError, match="facts are json, and PosixPath is not"):
        store.commit(fill(store.draft(1), 1), 1, {"path": Path("x")})


@pytest.mark.faults("F30")
@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a//b", ".", "", "a/", "a\0b", "x" * 300, "MANIFEST.json", "a/" * 3000]
)
def test_a_manifest_cannot_name_what_is_outside(store: Store, name: str) -> None:
    assert manifests.unsafe(name)
    path = saved(store, 1)
    good = read(path)
    bad = manifests.File(name, 5, good.files[0].blake3)
    content = {**json.loads(manifests.as_bytes(good)), "files": [vars(bad)]}
    del content["digest"]
    signed = json.dumps({**content, "digest": manifests._digest(content)}).encode()
    with pytest.raises(CheckpointError, match="RLKD-K010"):
        manifests.parse(signed)
    (path / "MANIFEST.json").write_bytes(signed)
    with pytest.raises(CheckpointError, match="none of them can be used"):
        store.newest()


# --- the disk


@pytest.mark.faults("F22")
def test_no_draft_without_room_for_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    size = read(saved(store, 1)).size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(1.1 * size) - 1))
    with pytest.raises(OSError, match=r"a checkpoint needs 12.\d kB, and 12.\d kB are free") as caught:
        store.draft(2)
    assert caught.value.errno == errno.ENOSPC
    assert store.steps().keys() == {1}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(1.1 * size) + 1))
    saved(store, 2)
    assert is_of(store.at(2).path, 2)


@pytest.mark.faults("F22")
@pytest.mark.parametrize("file", [1, 2, 3])
def test_a_disk_that_is_full_at_some_file_leaves_what_was_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    saved(store, 1)
    monkeypatch.setenv("RLKD_FAULT", f"commit.file:{file}=enospc")
    faults._passed.clear()
    draft = fill(store.draft(2), 2)
    with pytest.raises(OSError, match="enospc") as caught:
        store.commit(draft, 2, {})
    assert caught.value.errno == errno.ENOSPC
    store.discard(draft)
    assert sorted(os.listdir(store.directory)) == ["LATEST", "step-000001"]
    saved(store, 2)
    found = store.newest()
    assert found is not None
    assert is_of(found.path, 2)


FULL = """
import errno, os, subprocess, sys
from pathlib import Path
from rlkd.store.store import Store
from tests.store_help import fill, is_of, saved
directory = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", directory], check=True)
store = Store(directory / "checkpoints")
def full(call, *args):
    try:
        call(*args)
    except OSError as e:
        assert e.errno == errno.ENOSPC, e
    else:
        raise AssertionError("there was room")
def fill_up(name):
    with open(directory / name, "wb", 0) as f:
        full(lambda: [f.write(b"x" * 4096) for _ in range(10**6)])
saved(store, 1)
draft = fill(store.draft(2), 2)
fill_up("x")
full(store.commit, draft, 2, {})               # no room for the manifest
store.discard(draft)
assert sorted(os.listdir(store.directory)) == ["LATEST", "step-000001"], os.listdir(store.directory)
os.unlink(directory / "x")
saved(store, 2)
fill_up("y")
full(store.draft, 3)                           # no room for another one
found = store.newest()
assert is_of(found.path, 2) and is_of(store.at(1).path, 1)
"""


@pytest.mark.faults("F22")
def test_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    can = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True)
    if can.returncode:
        pytest.skip("this machine does not let a user mount a tmpfs of his own")
    command = ["unshare", "-Urm", sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.faults("F22")
def test_what_fails_after_the_commit_is_only_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """LATEST cannot be written, an old one cannot be renamed or deleted: the checkpoint stands."""
    (store.directory / "LATEST").mkdir(parents=True)
    (store.directory / "LATEST" / "x").touch()
    for step in (1, 2):
        saved(store, step)
    assert "LATEST cannot be written" in told(store)

    def broken(_: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(shutil, "rmtree", broken)
    saved(store, 3)
    assert "cannot be deleted: [Errno 16] busy" in told(store)
    assert store.steps().keys() == {2, 3}
    monkeypatch.undo()
    assert [name.startswith(".trash-step-000001") for name in store.clean()] == [True]


@pytest.mark.faults("F23")
def test_clean_removes_what_the_dead_left_and_nothing_of_the_living(store: Store) -> None:
    saved(store, 1)
    child(store.directory, 2, faults="commit.before_manifest=exit")
    (store.directory / ".tmp-step-000120").mkdir()  # of no known process
    (store.directory / ".trash-step-000004-1-1").mkdir()
    living = store.draft(3)
    left = [p for p in os.listdir(store.directory) if p.startswith(".tmp-step-000002")]
    assert len(left) == 1
    assert store.clean() == sorted([*left, ".tmp-step-000120", ".trash-step-000004-1-1"])
    assert sorted(os.listdir(store.directory)) == sorted(["LATEST", "step-000001", living.name])


def test_a_process_is_known_by_its_number_and_its_beginning() -> None:
    mine = names.of_draft(7)
    assert names.is_live(mine)
    pid, began, number = mine.removeprefix(".tmp-step-000007-").split("-")
    assert not names.is_live(f".tmp-step-000007-{pid}-{int(began) + 1}-{number}")  # its number was used again
    assert names.began(2**22 + 1) is None
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert names.began(dead.pid) is None  # nobody asked for its exit code yet
    dead.wait()


@pytest.mark.parametrize(
    "name", ["step-1", "step-0000001", "step-00001x", "step-000001 ", "xstep-000001", "step--00001"]
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert names.step_of(name) is None
    assert names.step_of("step-000001") == 1
    assert names.step_of("step-1234567") == 1234567


# --- retention


@pytest.mark.faults("F29")
def test_the_newest_stay_and_those_that_are_wanted(tmp_path: Path) -> None:
    store = Store(tmp_path, Keep(last=2, every=4, best=1))
    for step, score in enumerate([0.1, 0.9, 0.2, None, 0.9, 0.3, 0.4, 0.1, 0.0], 1):
        saved(store, step, score=score)
        if step == 3:
            store.pin(3)
    assert store.steps().keys() == {3, 4, 5, 8, 9}  # pinned, a multiple, the best, a multiple, the newest
    store.keep = Keep()
    assert store.prune() == [4, 5]
    assert store.unpin(3)
    assert not store.unpin(3)
    assert store.prune() == [3]


@pytest.mark.faults("F29")
def test_two_always_stay(tmp_path: Path) -> None:
    store = Store(tmp_path, Keep(last=0))
    for step in range(1, 6):
        saved(store, step)
    assert store.steps().keys() == {4, 5}


@pytest.mark.faults("F29", "F24")
def test_a_damaged_one_does_not_count_as_one_that_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, tell=Told())
    saved(store, 1)
    flip(saved(store, 2) / "driver.json")
    saved(store, 3)
    assert store.steps().keys() == {1, 3}
    assert store.bad() == ["step-000002"]
    assert ".bad/step-000002 is damaged: driver.json: its content was changed" in told(store)


@pytest.mark.faults("F29")
def test_negative_control_without_reading_them_again_too_much_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "verify", lambda *_: [])
    store = Store(tmp_path)
    saved(store, 1)
    flip(saved(store, 2) / "driver.json")
    saved(store, 3)
    assert store.steps().keys() == {2, 3}  # the only two whole ones were 1 and 3


def test_the_best_is_the_newer_of_two_that_are_equal_and_needs_a_number() -> None:
    scores = {1: 0.5, 2: 0.5, 3: None, 4: 0.1}
    assert special(scores, Keep(best=1), ()) == {2}
    assert special(scores, Keep(best=9), ()) == {1, 2, 4}
    assert special(scores, Keep(), (7, 4)) == {4}


def test_pinning_what_is_not_there(store: Store) -> None:
    saved(store, 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2[\s\S]*other steps: 1"):
        store.pin(2)


def test_problems_without_the_content_are_cheap(store: Store) -> None:
    path = saved(store, 1)
    manifest = read(path)
    flip(path / "driver.json")
    assert problems(path, manifest, content=False) == []
    (path / "driver.json").write_bytes(b"")
    assert problems(path, manifest, content=False) == ["driver.json: has 0 bytes, not 12"]
