"""What a reader of published weights may rely on: the bytes are those of one version, or there is an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkd.core.errors import InfrastructureError, PreflightError
from rlkd.engines import weights
from rlkd.engines.weights import Publisher, read, verify

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 5), max_size=3)


def tensors(seed: int, layout: list[tuple[list[int], torch.dtype]]) -> list[tuple[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, 2, shape, generator=random) for shape, _ in layout]
    return [(f"layer.{i}", (d * (i + 1 + seed)).to(t)) for i, (d, (_, t)) in enumerate(zip(draw, layout, strict=True))]


def same(found: list[tuple[str, torch.Tensor]], given: list[tuple[str, torch.Tensor]]) -> bool:
    return [n for n, _ in found] == [n for n, _ in given] and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for (_, a), (_, b) in zip(found, given, strict=True)
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6),
    other=st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6),
)
def test_what_is_read_is_what_was_published(
    tmp_path: Path, layout: list[tuple[list[int], torch.dtype]], other: list[tuple[list[int], torch.dtype]]
) -> None:
    """Any shapes and dtypes, also when the layout changes between versions."""
    publisher = Publisher(str(tmp_path))
    for version, content in enumerate([layout, other, layout, other]):
        ref = publisher.publish(version, tensors(version, content))
        assert same(list(read(ref)), tensors(version, content))
        verify(ref)
    publisher.close()


def test_tensors_of_any_memory_layout(tmp_path: Path) -> None:
    """Views that are not contiguous and tensors without dimensions arrive as they are."""
    base = torch.arange(24.0).reshape(4, 6)
    weights = [("t", base.t()), ("every", base[:, ::2]), ("scalar", torch.tensor(3.5)), ("grad", base.requires_grad_())]
    publisher = Publisher(str(tmp_path))
    assert same(list(read(publisher.publish(0, weights))), weights)
    publisher.close()


def test_two_versions_stay_readable(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path))
    layout = [([64, 64], torch.float32)]
    refs = [publisher.publish(v, tensors(v, layout)) for v in range(3)]
    assert same(list(read(refs[1])), tensors(1, layout))
    assert same(list(read(refs[2])), tensors(2, layout))
    with pytest.raises(InfrastructureError, match=r"weights of version 0 .* version 2 .* is in their place"):
        read(refs[0])
    publisher.close()


def test_slots_are_reused(tmp_path: Path) -> None:
    """The same two files, the same inodes: no memory is allocated again for an unchanged layout."""
    publisher = Publisher(str(tmp_path))
    layout = [([256, 256], torch.float32)]
    seen = set()
    for version in range(6):
        publisher.publish(version, tensors(version, layout))
        seen |= {(p.name, p.stat().st_ino, p.stat().st_size) for p in tmp_path.glob("*.bin")}
    assert len({inode for _, inode, _ in seen}) == 2
    assert len(list(tmp_path.iterdir())) == 4
    publisher.close()


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    embedding = torch.randn(1000, 16)
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("embed", embedding), ("norm", torch.ones(16)), ("lm_head", embedding.detach())])
    size = max(p.stat().st_size for p in tmp_path.glob("*.bin"))
    assert size < 1.1 * embedding.nbytes
    found = dict(read(ref))
    assert found["lm_head"].data_ptr() == found["embed"].data_ptr()
    assert torch.equal(found["lm_head"], embedding)
    publisher.close()


def test_reused_memory_is_not_taken_for_a_tie(tmp_path: Path) -> None:
    """Weights gathered one at a time may sit at the same address with other content."""
    buffer = torch.empty(100)

    def gathered():
        for i in range(3):
            yield f"layer.{i}", buffer.fill_(float(i))

    publisher = Publisher(str(tmp_path))
    found = {name: float(t[0]) for name, t in read(publisher.publish(0, gathered()))}
    assert found == {"layer.0": 0.0, "layer.1": 1.0, "layer.2": 2.0}
    publisher.close()


def test_reading_copies_nothing_and_cannot_change_the_file(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("a", torch.zeros(4096)), ("b", torch.ones(4096))])
    (_, a), (_, b) = read(ref)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()  # two views of one mapping
    a.fill_(9.0)
    assert dict(read(ref))["a"].eq(0).all()
    publisher.close()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("at", [0, 5000, 16383])
def test_one_flipped_bit_is_found(tmp_path: Path, at: int) -> None:
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("a", torch.randn(4096))])
    data = Path(ref.where).with_suffix(".bin")
    flip(data, at)
    with pytest.raises(InfrastructureError, match="do not have the digest"):
        read(ref)
    with pytest.raises(InfrastructureError, match="do not have the digest"):
        verify(ref)
    assert len(list(read(ref, verify=False))) == 1  # the negative control: without the check nobody notices
    flip(data, at)
    verify(ref)
    publisher.close()


def test_a_version_half_written_cannot_be_opened(tmp_path: Path) -> None:
    """A publisher that dies between two tensors leaves no index, so nobody reads a mixture."""
    publisher = Publisher(str(tmp_path))
    old = [publisher.publish(v, [("a", torch.full((64,), float(v))), ("b", torch.ones(64))]) for v in range(2)]

    def dies():
        yield "a", torch.full((64,), 7.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publisher.publish(2, dies())
    with pytest.raises(InfrastructureError, match="being rewritten"):
        read(old[0])
    assert float(next(read(old[1]))[1][0]) == 1.0
    publisher.close()


@pytest.mark.parametrize("checked", [True, False])
def test_a_version_overwritten_while_read_is_found(
    tmp_path: Path, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader looks at the index again after the last tensor; without that (control) it takes a mixture."""
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("a", torch.zeros(64)), ("b", torch.zeros(64))])
    reading = read(ref)
    if not checked:
        monkeypatch.setattr(weights, "_index", lambda _: {})
    taken = [float(next(reading)[1][0])]
    for version in (1, 2):
        publisher.publish(version, [("a", torch.ones(64)), ("b", torch.ones(64))])
    taken.append(float(next(reading)[1][0]))
    assert taken == [0.0, 1.0]
    if checked:
        with pytest.raises(InfrastructureError, match="version 2"):
            next(reading)
    else:
        assert list(reading) == []
    publisher.close()


def test_a_shorter_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """Reading a mapping past the end of its file would kill the process with SIGBUS."""
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("a", torch.randn(4096))])
    os.truncate(Path(ref.where).with_suffix(".bin"), 100)
    with pytest.raises(InfrastructureError, match="100 of 16384 bytes"):
        read(ref)
    publisher.close()


def test_a_damaged_index(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("a", torch.randn(8, 8))])
    index = Path(ref.where)
    content = json.loads(index.read_text())
    content["tensors"][0]["shape"] = [4, 16]
    index.write_text(json.dumps(content))
    with pytest.raises(InfrastructureError, match="do not have the digest"):
        read(ref)
    index.write_text("{")
    with pytest.raises(InfrastructureError, match="index cannot be read"):
        read(ref)
    publisher.close()


def test_digest_depends_on_content_names_and_shapes_only(tmp_path: Path) -> None:
    a, b = Publisher(str(tmp_path / "a")), Publisher(str(tmp_path / "b"))
    x = torch.randn(4, 4)
    assert a.publish(0, [("x", x)]).digest == b.publish(5, [("x", x.clone())]).digest
    assert a.publish(1, [("y", x)]).digest != b.publish(6, [("x", x)]).digest
    assert a.publish(2, [("x", x.reshape(2, 8))]).digest != b.publish(7, [("x", x)]).digest
    a.close()
    b.close()


def test_close_removes_the_files(tmp_path: Path) -> None:
    publisher = Publisher(str(tmp_path))
    ref = publisher.publish(0, [("a", torch.ones(4))])
    publisher.close()
    publisher.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InfrastructureError, match="their publisher is gone"):
        read(ref)


def test_files_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    script = (
        "import sys, os, torch; from rlkd.engines.weights import Publisher;"
        "Publisher(sys.argv[1]).publish(0, [('a', torch.ones(4))]); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=120)
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == 3  # two slots, one index
    mine = Publisher(str(tmp_path))
    ref = mine.publish(0, [("a", torch.ones(4))])
    second = Publisher(str(tmp_path))
    assert left.isdisjoint(p.name for p in tmp_path.iterdir())
    verify(ref)
    (tmp_path / "rlkd-weights-another-host-4026531836-999999-ab.0.bin").touch()
    assert weights.remove_stale(str(tmp_path)) == []
    mine.close()
    second.close()


def test_no_room_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(str(tmp_path))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PreflightError, match="No space left on device") as caught:
        publisher.publish(0, [("a", torch.ones(4))])
    assert str(tmp_path) in str(caught.value)
    assert "--shm-size" in str(caught.value)
    publisher.close()
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(PreflightError, match="cannot be written"):
        Publisher(str(blocked))
