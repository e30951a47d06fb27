"""Damaged checkpoints are never used, and always named: every kind of damage, and any bytes at all as a manifest."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core.errors import CheckpointError
from rlkd.store import folder, manifest
from rlkd.store.manifest import File, Manifest, parse, read
from rlkd.store.retention import Keep
from rlkd.store.store import Store
from tests.store_help import FILES, Told, flip, is_of, saved

Damage = Callable[[Path], object]
FUZZED = 150  # inputs of each fuzz test; RLKD_FUZZ=N: N of each


def store_of(directory: Path, steps: int = 2) -> Store:
    store = Store(directory, Keep(last=9), Told())
    for step in range(1, steps + 1):
        saved(store, step)
    return store


def text_of(store: Store) -> str:
    assert isinstance(store.tell, Told)
    return store.tell.text


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads((path / "MANIFEST.json").read_text())
    change(content)
    (path / "MANIFEST.json").write_text(json.dumps(content))


def linked(path: Path) -> None:
    (path / "driver.json").rename(path.parent / "elsewhere")
    (path / "driver.json").symlink_to(path.parent / "elsewhere")


def linked_folder(path: Path) -> None:
    (path / "learner").rename(path.parent / "elsewhere")
    (path / "learner").symlink_to(path.parent / "elsewhere")


def linked_whole(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def a_file_for_a_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def of_another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-000001", path)


DAMAGES: dict[str, tuple[Damage, str]] = {
    **{f"flip {n}": (lambda p, n=n: flip(p / n), f"{n}: its content was changed") for n in FILES},
    **{f"cut {n}": (lambda p, n=n: os.truncate(p / n, 5), f"{n}: has 5 bytes, not ") for n in FILES},
    **{f"longer {n}": (lambda p, n=n: os.truncate(p / n, 99999), f"{n}: has 99999 bytes") for n in FILES},
    **{f"missing {n}": (lambda p, n=n: (p / n).unlink(), f"{n}: is missing") for n in FILES},
    "missing folder": (lambda p: shutil.rmtree(p / "learner"), "learner/rank-0.pt: is missing"),
    "extra": (lambda p: (p / "learner" / "rank-1.pt").write_bytes(b""), "rank-1.pt: is not in the manifest"),
    "a link": (linked, "driver.json: is a link, not a file"),
    "a folder that is a link": (linked_folder, "learner: is a link, not a file"),
    "all a link": (linked_whole, "it is no folder"),
    "a file": (a_file_for_a_folder, "it is no folder"),
    "a pipe": (lambda p: os.mkfifo(p / "x"), "x: is a special file, not a file"),
    "no manifest": (lambda p: (p / "MANIFEST.json").unlink(), "No such file"),
    "empty manifest": (lambda p: os.truncate(p / "MANIFEST.json", 0), "cannot be used"),
    "cut manifest": (lambda p: os.truncate(p / "MANIFEST.json", 200), "cannot be used"),
    "garbled manifest": (lambda p: (p / "MANIFEST.json").write_bytes(os.urandom(500)), "cannot be used"),
    "manifest of numbers": (lambda p: (p / "MANIFEST.json").write_text("[1]"), "it is no manifest"),
    "nested manifest": (lambda p: (p / "MANIFEST.json").write_text("[" * 10**5), "nested too deeply"),
    "a hash edited": (lambda p: edit(p, lambda m: m["files"][0].update(blake3="0" * 64)), "it was changed after"),  # type: ignore[index]
    "a fact edited": (lambda p: edit(p, lambda m: m["facts"].update(of=3)), "it was changed after it was written"),  # type: ignore[attr-defined]
    "the step edited": (lambda p: edit(p, lambda m: m.update(step=3)), "it was changed after it was written"),
    "the format edited": (lambda p: edit(p, lambda m: m.update(format=2)), "it was changed after it was written"),
    "of another step": (of_another_step, "its manifest is of step 1"),
    "manifest a folder": (lambda p: ((p / "MANIFEST.json").unlink(), (p / "MANIFEST.json").mkdir()), "cannot be used"),
    "manifest a link": (
        lambda p: ((p / "MANIFEST.json").rename(p.parent / "m"), (p / "MANIFEST.json").symlink_to(p.parent / "m")),
        "cannot be used",
    ),
    "manifest a pipe": (lambda p: ((p / "MANIFEST.json").unlink(), os.mkfifo(p / "MANIFEST.json")), "cannot be used"),
}


@pytest.mark.faults("F24")
@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_is_used_instead_of_a_damaged_one(tmp_path: Path, kind: str) -> None:
    store = store_of(tmp_path)
    damage, said = DAMAGES[kind]
    damage(tmp_path / "step-000002")
    looked = store.newest(mend=False)
    assert looked is not None
    assert store.there() == [1, 2]
    found = store.newest()
    assert found is not None
    assert found.manifest.step == looked.manifest.step == 1
    assert is_of(found.path, 1)
    assert store.there() == [1]
    assert store.bad() == ["step-000002"]
    assert ".bad/step-000002 is damaged: " in text_of(store)
    assert said in text_of(store)
    assert "step 1 is used instead" in text_of(store)


@pytest.mark.faults("F24")
def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """A changed byte is found, or it was one that means nothing (a space)."""
    path = saved(Store(tmp_path), 1)
    data = (path / "MANIFEST.json").read_bytes()
    good = parse(data)
    found = 0
    for at in range(len(data)):
        for bit in (1, 16, 128):
            changed = bytearray(data)
            changed[at] ^= bit
            try:
                assert parse(bytes(changed)) == good
            except CheckpointError:
                found += 1
    assert found > 0.95 * 3 * len(data)


@pytest.mark.faults("F24")
def test_damaged_twice_both_are_kept_for_the_user(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for _ in range(2):
        flip(tmp_path / "step-000002" / "driver.json")
        assert store.newest() is not None
        saved(store, 2)
    assert store.bad() == ["step-000002", "step-000002-2"]


@pytest.mark.faults("F25")
@pytest.mark.parametrize(
    "latest", [None, b"", b"step-000001", b"step-000009\n", b"../../x", b"\xff\0", "a folder", "a link"]
)
def test_what_latest_says_has_no_effect(tmp_path: Path, latest: bytes | str | None) -> None:
    store = store_of(tmp_path)
    path = tmp_path / "LATEST"
    path.unlink()
    if isinstance(latest, bytes):
        path.write_bytes(latest)
    elif latest == "a folder":
        path.mkdir()
    elif latest == "a link":
        path.symlink_to("/nowhere")
    found = store.newest()
    assert found is not None
    assert is_of(found.path, 2)
    assert text_of(store) == ""


@pytest.mark.faults("F70")
def test_one_of_a_newer_rlkd_is_not_damaged_but_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    content = {**json.loads((tmp_path / "step-000002" / "MANIFEST.json").read_text()), "format": 2, "new": True}
    del content["digest"]
    signed = {**content, "digest": manifest._digest(content)}
    (tmp_path / "step-000002" / "MANIFEST.json").write_text(json.dumps(signed))
    with pytest.raises(CheckpointError, match="has format 2, and this rlkd reads format 1") as caught:
        store.newest()
    assert caught.value.exit_code == 7
    assert store.there() == [1, 2]
    saved(store, 3)
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 3


@pytest.mark.parametrize("what", ["manifest", "file"])
def test_what_may_not_be_read_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A network disk that is away for a moment: older weights would silently be trained again."""
    store = store_of(tmp_path)
    real = os.open

    def refused(path: object, *args: int, **options: int) -> int:
        if str(path).endswith("step-000002/MANIFEST.json" if what == "manifest" else "step-000002/driver.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(os, "open", refused)
    for call in (store.newest, lambda: store.at(2)):
        with pytest.raises(CheckpointError, match=r"RLKD-K014[\s\S]*Permission denied"):
            call()
    assert store.there() == [1, 2]


@pytest.mark.faults("F24")
def test_a_bad_sector_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path)
    real = manifest.digest

    def bad(path: Path, sync: bool = False) -> tuple[int, str]:
        if path.match("step-000002/driver.json"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, sync)

    monkeypatch.setattr(manifest, "digest", bad)
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 1
    assert "driver.json: Input/output error" in text_of(store)


@pytest.mark.faults("F24")
def test_what_cannot_be_moved_away_is_told_and_not_used(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    flip(tmp_path / "step-000002" / "driver.json")
    (tmp_path / ".bad").write_bytes(b"")  # something is in the way
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 1
    assert "step-000002 cannot be moved to .bad" in text_of(store)


@pytest.mark.faults("F24")
def test_negative_control_without_the_hashes_a_flipped_byte_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path)
    flip(tmp_path / "step-000002" / "driver.json")
    unchecked = manifest.problems
    monkeypatch.setattr(folder, "problems", lambda path, found: unchecked(path, found, content=False))
    found = store.newest()
    assert found is not None
    assert found.manifest.step == 2
    assert not is_of(found.path, 2)


# --- any bytes at all


GOOD = Manifest(1, 7, (File("driver.json", 3, "ab" * 32), File("learner/x.pt", 4, "cd" * 32)), {"score": 0.5}, "")
INPUTS = int(os.environ.get("RLKD_FUZZ", FUZZED))
texts = st.text(max_size=20) | st.sampled_from(
    ["driver.json", "../x", "/x", "a\0b", "MANIFEST.json", "ab" * 32, "\ud800"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries({"path": texts | values, "size": st.integers(-3, 9) | values, "blake3": texts | values})
likely = st.fixed_dictionaries(
    {"format": st.just(1) | values, "step": st.integers(-1, 9) | values, "facts": st.just({}) | values},
    optional={"files": st.lists(entries, max_size=3) | values, "digest": texts | values, "more": values},
)


def only_checkpoint_errors(data: bytes) -> None:
    """A manifest, every name of which is safe, or a CheckpointError of one line that names the place."""
    found = error = None
    try:
        found = parse(data, "here")
    except CheckpointError as e:
        (error,) = e.problems
    if error is not None:
        assert error.where == "here"
        assert "\n" not in error.what
    else:
        assert found is not None
        assert all(manifest.unsafe(f.path) is None for f in found.files)
        assert 0 <= found.step < 2**63


@settings(max_examples=INPUTS, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    only_checkpoint_errors(data)


@settings(max_examples=INPUTS, deadline=None)
@given(values | likely, st.booleans())
def test_any_json(content: object, sign: bool) -> None:
    """Signed ones too: whoever can write the disk can write a digest."""
    if sign and isinstance(content, dict):
        try:
            content = {**content, "digest": manifest._digest({k: v for k, v in content.items() if k != "digest"})}
        except ValueError:  # NaN: cannot be signed
            content = {**content, "digest": ""}
    only_checkpoint_errors(json.dumps(content).encode())


@settings(max_examples=INPUTS, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_any_damage_of_a_good_one(randoms: random.Random, changes: int) -> None:
    data = bytearray(manifest.as_bytes(GOOD))
    for _ in range(changes):
        at, kind = randoms.randrange(len(data)), randoms.randrange(4)
        if kind == 0:
            data[at] = randoms.randrange(256)
        elif kind == 1:
            del data[at : at + randoms.randrange(1, 30)]
        elif kind == 2:
            data[at:at] = data[: randoms.randrange(1, 60)]
        else:
            data = data[: at + 1]
        if not data:
            break
    only_checkpoint_errors(bytes(data))


def test_a_manifest_is_read_only_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Store(tmp_path), 1)
    monkeypatch.setattr(manifest, "LARGEST", 100)
    with pytest.raises(CheckpointError, match="it is over"):
        read(path)
