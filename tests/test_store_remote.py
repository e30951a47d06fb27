"""Copies in a remote store: an S3 of our own (moto), a folder, memory; slow, failing, silent, dying in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlkd.core.errors import CheckpointError, PreflightError
from rlkd.store import fetch, upload
from rlkd.store import manifest as manifests
from rlkd.store.remote import Remote
from rlkd.store.retention import Keep
from rlkd.store.store import Store
from tests.store_help import FILES, Told, child, flip, is_of, saved

pytestmark = pytest.mark.faults("F28")
WAIT_S = 60.0
UPLOAD = """
import sys
from pathlib import Path
from tests.store_help import saved
from rlkd.store.remote import Remote
from rlkd.store.store import Store
root = Path(sys.argv[1])
store = Store(root / "here", remote=Remote(f"file://{root}/there"))
saved(store, int(sys.argv[2]))
assert store.close(60)
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[subprocess.Popen[str]]:
    """The server's process; the environment says where it is and lets everybody in."""
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "tests.store_help_s3"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{int(process.stdout.readline())}")
            yield process
            process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.stack)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new place in each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    place = {"memory": "memory:/", "file": f"file://{tmp_path}/there", "s3": "s3://bucket"}[request.param]
    return f"{place}/{tmp_path.name}"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A folder as a remote store, tried again at once."""
    for module in (upload, fetch):
        monkeypatch.setattr(module, "SLOWEST_RETRY_S", 0.02)
    return Remote(f"file://{tmp_path}/there")


def store_at(directory: Path, remote: Remote, keep: Keep = Keep()) -> Store:  # noqa: B008 - frozen
    return Store(directory, keep, Told(), remote)


def told(store: Store) -> str:
    store.news()
    assert isinstance(store.tell, Told)
    return store.tell.text


def patched(remote: Remote, monkeypatch: pytest.MonkeyPatch, name: str, before: Callable[..., object]) -> None:
    """Call `before` with what the store's client is called with, and then the client."""
    real = getattr(remote.fs, name)

    def call(*args: Any, **options: Any) -> Any:
        before(*args)
        return real(*args, **options)

    monkeypatch.setattr(remote.fs, name, call)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- there and back


@pytest.mark.faults("F28")
def test_a_new_machine_goes_on_where_the_old_one_ended(tmp_path: Path, url: str) -> None:
    one = store_at(tmp_path / "one", Remote(url))
    assert one.newest() is None
    for step in (1, 2):
        saved(one, step)
        assert one.close(WAIT_S)
    assert f"step 2 is in {url}" in told(one)
    two = store_at(tmp_path / "two", Remote(url))
    found = two.newest()
    assert found is not None
    assert found.path == tmp_path / "two" / "step-000002"
    assert is_of(found.path, 2)
    assert sorted(os.listdir(tmp_path / "two")) == ["step-000002"]
    saved(two, 3)
    assert two.close(WAIT_S)
    back = one.newest()
    assert back is not None
    assert is_of(back.path, 3)
    assert Remote(url).steps() == [2, 3]  # what is kept here is kept there


def test_without_its_manifest_there_is_none(tmp_path: Path, url: str) -> None:
    remote = Remote(url)
    store = store_at(tmp_path / "one", remote)
    saved(store, 1)
    assert store.close(WAIT_S)
    assert remote.steps() == [1]
    remote.fs.rm_file(f"{remote.root}/step-000001/MANIFEST.json")
    assert Remote(url).steps() == []
    assert Remote(url).begun() == [1]
    assert store_at(tmp_path / "two", Remote(url)).newest() is None


@pytest.mark.faults("F24")
@pytest.mark.parametrize("what", ["flipped", "cut", "missing", "garbled manifest", "other step"])
def test_the_newest_whole_one_there_is_used(tmp_path: Path, there: Remote, what: str) -> None:
    remote = there
    store = store_at(tmp_path / "one", remote, Keep(last=3))
    for step in (1, 2, 3):
        saved(store, step)
        assert store.close(WAIT_S)
    at = f"{remote.root}/step-000003"
    name = f"{at}/learner/rank-0.pt"
    data = bytearray(remote.fs.cat_file(name))
    data[99] ^= 1
    if what == "missing":
        remote.fs.rm_file(name)
    elif what == "other step":
        remote.fs.pipe_file(f"{at}/MANIFEST.json", remote.fs.cat_file(f"{remote.root}/step-000002/MANIFEST.json"))
    elif what == "garbled manifest":
        remote.fs.pipe_file(f"{at}/MANIFEST.json", b"{}")
    else:
        remote.fs.pipe_file(name, bytes(data) if what == "flipped" else bytes(data[:7]))
    two = store_at(tmp_path / "two", remote)
    found = two.newest()
    assert found is not None
    assert is_of(found.path, 2)
    assert "step-000003 is damaged" in told(two)
    assert "step 2 is used instead" in told(two)
    assert sorted(os.listdir(tmp_path / "two")) == ["step-000002"]


def test_what_is_newer_here_is_not_fetched_but_uploaded(tmp_path: Path, there: Remote) -> None:
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    assert store.close(WAIT_S)
    saved(Store(tmp_path / "one"), 2)  # the process died before it was uploaded
    again = store_at(tmp_path / "one", there)
    found = again.newest()
    assert found is not None
    assert found.manifest.step == 2
    assert again.close(WAIT_S)
    assert there.steps() == [1, 2]
    assert "fetched" not in told(again)
    once_more = store_at(tmp_path / "one", there)
    assert once_more.newest() is not None
    assert once_more.close(WAIT_S)
    assert told(once_more) == ""


@pytest.mark.faults("F24")
def test_a_damaged_one_here_is_fetched_whole(tmp_path: Path, there: Remote) -> None:
    store = store_at(tmp_path / "one", there)
    path = saved(store, 1)
    assert store.close(WAIT_S)
    flip(path / "driver.json")
    found = store_at(tmp_path / "one", there).newest()
    assert found is not None
    assert is_of(found.path, 1)


# --- a store that fails


def test_uploads_wait_in_a_queue_of_one_and_nothing_waits_for_them(
    tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    patched(there, monkeypatch, "put_file", lambda *_: go.wait(WAIT_S))
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    until(lambda: (tmp_path / "there" / ".uploading" / "step-000001").exists())
    for step in (2, 3, 4):
        saved(store, step)
    lag = r"uploads lag: step 1 \(11\.3 kB\) is under way for \d+ s, and step 2 waits"
    assert re.search(lag, told(store))
    assert "step 2 is not uploaded: step 3 takes its place" in told(store)
    assert store.steps().keys() == {1, 3, 4}  # 1 is not deleted while it is read
    go.set()
    assert store.close(WAIT_S)
    assert there.steps() == [1, 4]
    assert store.prune() == [1]


def test_an_outage_is_told_once_and_passes(tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) < 5:
            raise ConnectionError("the cable is out")

    patched(there, monkeypatch, "put_file", fail)
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    assert store.close(WAIT_S)
    assert told(store).count("the cable is out") == 1
    assert "is tried again while training goes on" in told(store)
    assert f"step 1 is in {there.url}, after 4 failures" in told(store)
    found = store_at(tmp_path / "two", there).newest()
    assert found is not None
    assert is_of(found.path, 1)


@pytest.mark.faults("F28")
def test_an_outage_that_lasts_stops_nothing(tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("the cable is out")

    patched(there, monkeypatch, "put_file", fail)
    store = store_at(tmp_path / "one", there)
    for step in range(1, 6):
        saved(store, step)
    assert not store.close(0.1)
    assert f"step 5 is not in {there.url}: it is only on the disk of this machine" in told(store)
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 5


def test_a_store_that_never_answers_is_given_up(tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    there.timeout_s = 0.05
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    assert store.close(WAIT_S)
    never = threading.Event()
    for name in ("ls", "put_file"):
        patched(there, monkeypatch, name, lambda *_: never.wait(WAIT_S))
    found = store.newest()
    assert found is not None
    assert is_of(found.path, 1)
    assert "cannot be read, step 1 of this disk is used: listing: no answer within 0 s" in told(store)
    with pytest.raises(CheckpointError, match=r"RLKD-K015[\s\S]*no answer") as caught:
        store_at(tmp_path / "two", there).newest()  # there may be a checkpoint there: not a fresh start
    assert caught.value.exit_code == 7
    never.set()


@pytest.mark.stack
@pytest.mark.usefixtures("s3")
def test_no_bucket_is_no_empty_store(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"RLKD-K015[\s\S]*there is no misspelt there"):
        store_at(tmp_path, Remote("s3://misspelt/runs")).newest()


@pytest.mark.stack
@pytest.mark.faults("F28")
def test_s3_stopped_in_the_middle_of_an_upload_and_going_on(
    tmp_path: Path, s3: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's process is stopped before the second file: requests hang, are given up, and made again."""
    monkeypatch.setattr(upload, "SLOWEST_RETRY_S", 0.05)
    remote = Remote(f"s3://bucket/{tmp_path.name}")
    assert remote.steps() == []
    remote.timeout_s = 1.0
    stopped, names = threading.Event(), list[str]()

    def stop(source: str, *_: object) -> None:
        names.append(Path(source).name)
        if len(names) == 2:
            s3.send_signal(signal.SIGSTOP)
            stopped.set()

    patched(remote, monkeypatch, "put_file", stop)
    store = store_at(tmp_path / "one", remote)
    saved(store, 1)
    try:
        assert stopped.wait(WAIT_S)
        until(lambda: "no answer within" in told(store))
        saved(store, 2)  # training goes on
    finally:
        s3.send_signal(signal.SIGCONT)
        remote.timeout_s = WAIT_S
    assert store.close(WAIT_S)
    assert remote.steps()[-1] == 2
    found = store_at(tmp_path / "two", Remote(f"s3://bucket/{tmp_path.name}")).newest()
    assert found is not None
    assert is_of(found.path, 2)


@pytest.mark.faults("F23", "F28")
@pytest.mark.parametrize(("point", "left"), [("file:2", 2), ("before_manifest", 0), ("after_manifest", 0)])
def test_a_process_that_dies_while_it_uploads(
    tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch, point: str, left: int
) -> None:
    """Nobody sees half of it; the next process uploads what is missing, and nothing twice."""
    assert child(tmp_path, 1, faults=f"upload.{point}=exit", script=UPLOAD) == 9
    assert there.steps() == ([1] if point == "after_manifest" else [])
    new = store_at(tmp_path / "new", there)
    assert (new.newest() is not None) == (point == "after_manifest")
    again: list[str] = []
    patched(there, monkeypatch, "put_file", lambda source, *_: again.append(source))
    store = store_at(tmp_path / "here", there)
    store.clean()
    assert store.newest() is not None
    assert store.close(WAIT_S)
    assert len(again) == left
    assert there.steps() == [1]
    found = store_at(tmp_path / "newer", there).newest()
    assert found is not None
    assert is_of(found.path, 1)


def test_half_of_another_attempt_at_a_step_is_not_mixed_in(tmp_path: Path, there: Remote) -> None:
    """Files of the same names and sizes, of the same step, of another life."""
    assert child(tmp_path, 1, faults="upload.before_manifest=exit", script=UPLOAD) == 9
    other = store_at(tmp_path / "one", there)
    draft = other.draft(1)
    for name, data in FILES.items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(b"2" + data[::-1])
    other.commit(draft, 1, {})
    assert other.close(WAIT_S)
    found = store_at(tmp_path / "new", there).newest()
    assert found is not None
    assert (found.path / "driver.json").read_bytes() == b"2" + FILES["driver.json"][::-1]


# --- what stays there


@pytest.mark.faults("F29")
def test_what_is_kept_here_is_kept_there_and_pins_go_with_it(tmp_path: Path, there: Remote) -> None:
    store = store_at(tmp_path / "one", there, Keep(best=1))
    for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
        saved(store, step, score=score)
        if step == 1:
            store.pin(1)
        assert store.close(WAIT_S)
    assert there.steps() == [1, 2, 4, 5]
    two = store_at(tmp_path / "two", there)  # another machine, other wishes
    assert two.newest() is not None
    for step in (6, 7):
        saved(two, step)
        assert two.close(WAIT_S)
    assert there.steps() == [1, 6, 7]
    assert two.unpin(1)
    saved(two, 8)
    assert two.close(WAIT_S)
    assert there.steps() == [7, 8]


@pytest.mark.faults("F29")
def test_what_was_begun_and_never_finished_is_deleted_later(tmp_path: Path, there: Remote) -> None:
    assert child(tmp_path, 1, faults="upload.before_manifest=exit", script=UPLOAD) == 9
    store = store_at(tmp_path / "one", there)
    for step in (2, 3):
        saved(store, step)
        assert store.close(WAIT_S)
    assert there.begun() == [2, 3]


@pytest.mark.faults("F29")
def test_nothing_is_deleted_there_when_the_pins_cannot_be_read(tmp_path: Path, there: Remote) -> None:
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    assert store.close(WAIT_S)
    (tmp_path / "there" / ".pins").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="is no list of steps"):
        store_at(tmp_path / "two", there).newest()


def test_an_upload_of_what_was_deleted_is_given_up(
    tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = threading.Event()
    patched(there, monkeypatch, "put_file", lambda *_: gone.wait(WAIT_S))
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    os.rename(tmp_path / "one" / "step-000001", tmp_path / "elsewhere")
    gone.set()
    assert store.close(WAIT_S)
    assert "step 1 is not uploaded: FileNotFoundError" in told(store)
    assert there.steps() == []


def test_what_was_withdrawn_is_not_fetched_and_makes_room_for_the_next_life(tmp_path: Path, there: Remote) -> None:
    store = store_at(tmp_path / "one", there, Keep(last=9))
    for step in (1, 2, 3):
        saved(store, step)
        assert store.close(WAIT_S)
    assert store.withdraw_after(1) == [2, 3]
    assert (there.steps(), there.begun()) == ([1], [1, 2, 3])
    found = store_at(tmp_path / "two", there).newest()
    assert found is not None
    assert found.manifest.step == 1
    again = store_at(tmp_path / "three", there)
    for step in (2, 4, 5):
        saved(again, step)
        assert again.close(WAIT_S)
    assert (there.steps(), there.begun()) == ([4, 5], [4, 5])
    assert Store(tmp_path / "one").withdraw_after(1) == []  # without a remote store


# --- whom one trusts


@pytest.mark.faults("F30")
def test_a_manifest_from_afar_cannot_write_outside(tmp_path: Path, there: Remote) -> None:
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    assert store.close(WAIT_S)
    path = tmp_path / "there" / "step-000001" / "MANIFEST.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["files"][0]["path"] = "../../../canary"
    path.write_text(json.dumps({**content, "digest": manifests._digest(content)}))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        store_at(tmp_path / "two" / "deep", there).newest()
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("bad", ["nothing-like-it://x/y", "s3://", "file:///", "memory://"])
def test_a_url_that_nothing_can_open(bad: str) -> None:
    with pytest.raises(PreflightError, match="RLKD-E190") as caught:
        Remote(bad)
    assert bad in str(caught.value)


def test_a_disk_without_room_for_what_is_fetched(
    tmp_path: Path, there: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_at(tmp_path / "one", there)
    saved(store, 1)
    assert store.close(WAIT_S)
    monkeypatch.setattr(Store, "_free", lambda _: 100)
    with pytest.raises(CheckpointError, match=r"needs 12.\d kB, and 100 B are free"):
        store_at(tmp_path / "two", there).newest()
