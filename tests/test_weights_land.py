"""Weights that come to another machine in pieces are those that were published, or there is an error."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlkd.core.errors import InfrastructureError
from rlkd.core.ports import WeightRef
from rlkd.engines.weights import Publisher, contents, piece, read, there, verify

TIED = torch.arange(40.0).reshape(8, 5)
MODEL = [("a", TIED), ("b", torch.arange(7, dtype=torch.int64)), ("tied", TIED), ("none", torch.empty(0, 3)),
         ("c", torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16))]  # fmt: skip


def pieces(ref: WeightRef, size: int, each: int) -> Iterator[tuple[int, memoryview]]:
    for start in range(0, size, each):
        yield start, memoryview(piece(ref, start, each).copy())
        there(ref)


@pytest.mark.parametrize("each", [1, 7, 64, 10_000])
def test_what_lands_is_what_was_published(tmp_path: Path, each: int) -> None:
    here, other = Publisher(str(tmp_path / "here")), Publisher(str(tmp_path / "other"))
    for version in range(3):
        ref = here.publish(version, MODEL)
        tensors, size = contents(ref)
        landed = other.land(ref, tensors, pieces(ref, size, each))
        assert (landed.version, landed.digest) == (ref.version, ref.digest)
        assert Path(landed.where).parent == tmp_path / "other"
        verify(landed)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(read(landed), MODEL, strict=True))
    other.close()
    assert not list((tmp_path / "other").iterdir())
    here.close()


def test_a_piece_that_was_damaged_on_the_way_is_found(tmp_path: Path) -> None:
    here, other = Publisher(str(tmp_path / "here")), Publisher(str(tmp_path / "other"))
    ref = here.publish(1, MODEL)
    tensors, size = contents(ref)

    def damaged() -> Iterator[tuple[int, memoryview]]:
        for start, raw in pieces(ref, size, 50):
            yield start, memoryview(bytes([raw[0] ^ 1, *raw[1:]])) if start == 100 else raw

    with pytest.raises(InfrastructureError, match="do not have the digest"):
        verify(other.land(ref, tensors, damaged()))


def test_a_version_that_is_overwritten_on_the_way_is_never_there(tmp_path: Path) -> None:
    """And one that was cut off leaves nothing that could be read."""
    here, other = Publisher(str(tmp_path / "here")), Publisher(str(tmp_path / "other"))
    ref = here.publish(1, MODEL)
    tensors, size = contents(ref)

    def overtaken() -> Iterator[tuple[int, memoryview]]:
        for start, raw in pieces(ref, size, 50):
            yield start, raw
            here.publish(2 + start, MODEL)

    with pytest.raises(InfrastructureError, match="RLKD-I601"):
        other.land(ref, tensors, overtaken())
    assert not list((tmp_path / "other").glob("*.json"))
