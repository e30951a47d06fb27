"""Weights from the learner to the rollout workers of one machine (or one shared disk), without a copy on the way in.

A `Publisher` owns two data files, its slots, and fills them in turn: while workers read version v, version v+1 is
written beside it. Next to each slot lies its index (names, shapes, dtypes, offsets, version, digest). The index is
removed before the first byte of the slot changes and put back, by an atomic rename, after the last one: where there is
an index there is a whole version. `read` maps the data and looks at the index again when the last tensor has been
taken, because the publisher may have come round to the same slot in the meantime.

To another machine a version goes in pieces: `contents` and `piece` where it is, `Publisher.land` where it comes
(workers/carrier.py). There it has the same form.

The digest is blake3 over every name, dtype, shape and byte: any change of the data is found, not only torn writes.
"""

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from rlkd.core.errors import InfrastructureError, PreflightError
from rlkd.core.ports import WeightRef

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every dtype's size
_WRITE_AT_ONCE = 1 << 30  # bytes; Linux writes at most 2 GiB in one call
_PREFIX = "rlkd-weights"


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in the data file. Tied tensors are entries with the same offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes


class Publisher:
    """Writes versions of the weights for readers on this machine (a directory in /dev/shm) or on a shared disk.

    Files are named after host, process and slot, so that those of a dead run can be told from those of a live one;
    a new publisher removes what dead ones of this host left in its directory.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            remove_stale(directory)
            stem = f"{_PREFIX}-{_owner(os.getpid())}-{os.urandom(4).hex()}"
            self._slots = [_Slot(self._directory / f"{stem}.{i}") for i in range(2)]
        except OSError as error:
            raise _unwritable(directory, error) from error
        self._published = 0

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> WeightRef:
        """Write all tensors (any device; one at a time, so they may be gathered lazily) as `version`.

        Raises PreflightError when the directory has no room for them. The slot used is that of two versions ago.
        """
        slot = self._slots[self._published % len(self._slots)]
        self._published += 1
        try:
            return slot.write(version, weights)
        except OSError as error:
            raise _unwritable(str(self._directory), error) from error

    def land(
        self, ref: WeightRef, tensors: Sequence[Mapping[str, Any]], pieces: Iterable[tuple[int, memoryview]]
    ) -> WeightRef:
        """Write down a version that was published elsewhere: its `contents`, and its bytes in pieces with their
        offsets. The same version and digest, here; who loads it checks them. PreflightError as `publish`."""
        slot = self._slots[self._published % len(self._slots)]
        self._published += 1
        try:
            return slot.land(ref, [_entry(t) for t in tensors], pieces)
        except OSError as error:
            raise _unwritable(str(self._directory), error) from error

    def close(self) -> None:
        """Remove the files. Readers that still hold a mapping keep their bytes."""
        for slot in self._slots:
            slot.close()


class _Slot:
    """One data file and its index."""

    def __init__(self, path: Path) -> None:
        self.data = path.with_name(path.name + ".bin")
        self.index = path.with_name(path.name + ".json")
        self._fd = os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> WeightRef:
        self.index.unlink(missing_ok=True)  # from here on nobody may begin to read
        entries: list[_Entry] = []
        seen: dict[tuple[int, str, tuple[int, ...]], _Entry] = {}
        digest, end = blake3(), 0
        for name, tensor in weights:
            raw = _bytes(tensor)
            place = (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape))
            twin = seen.get(place)
            if twin is None or not self._holds(twin, raw):
                self._write(raw, end)
                twin = seen[place] = _Entry(name, place[1].removeprefix("torch."), place[2], end, len(raw))
                end = -(-(end + len(raw)) // ALIGNMENT) * ALIGNMENT
            entry = _Entry(name, twin.dtype, twin.shape, twin.offset, twin.size)
            entries.append(entry)
            _digest_entry(digest, entry, raw if entry.name == twin.name else None)
        # The file is never cut: an unchanged layout keeps its pages, and a mapping never ends up past the end.
        os.fdatasync(self._fd)  # a shared disk shows other nodes only what was synced; costs nothing in shared memory
        return self._commit(version, digest.hexdigest(), entries)

    def land(self, ref: WeightRef, entries: list[_Entry], pieces: Iterable[tuple[int, memoryview]]) -> WeightRef:
        self.index.unlink(missing_ok=True)
        for offset, raw in pieces:
            self._write(raw, offset)
        os.fdatasync(self._fd)
        return self._commit(ref.version, ref.digest, entries)

    def _write(self, raw: memoryview, offset: int) -> None:
        done = 0
        while done < len(raw):
            done += os.pwrite(self._fd, raw[done : done + _WRITE_AT_ONCE], offset + done)

    def _holds(self, entry: _Entry, raw: memoryview) -> bool:
        """Whether the bytes are really those written: the memory of a tensor gathered before may have been reused."""
        return os.pread(self._fd, entry.size, entry.offset) == raw

    def _commit(self, version: int, digest: str, entries: list[_Entry]) -> WeightRef:
        ref = WeightRef(version, str(self.index), digest)
        content = {"version": version, "digest": digest, "data": self.data.name, "tensors": [vars(e) for e in entries]}
        partial = self.index.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(self.index)
        return ref

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for path in (self.index, self.index.with_suffix(".partial"), self.data):
            path.unlink(missing_ok=True)


def read(ref: WeightRef, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one version, as views of the file: nothing is copied, so take what you need before the publisher
    has written two more versions. With `verify` all bytes are checked against the digest first.

    Raises InfrastructureError when the version is not (or no longer) there, before the first tensor, or damaged; and
    after the last one when it was overwritten in the meantime: what was taken is then worthless.
    """
    entries, mapped = _open(ref)
    if verify:
        _verify(ref, entries, mapped)
    return _views(ref, entries, mapped)


def verify(ref: WeightRef) -> None:
    """Check all bytes of a version against its digest. Raises InfrastructureError as `read` does."""
    _verify(ref, *_open(ref))
    _index(ref)


def contents(ref: WeightRef) -> tuple[list[dict[str, Any]], int]:
    """The tensors of a version as its index lists them, and how many bytes they are in all; for `Publisher.land`.
    InfrastructureError as `read`."""
    entries, mapped = _open(ref)
    return [vars(e) for e in entries], len(mapped)


def piece(ref: WeightRef, offset: int, size: int) -> np.ndarray:
    """Up to `size` bytes of a version from `offset` on, as a view: take a copy, then ask `there`."""
    found: np.ndarray = _open(ref)[1][offset : offset + size].numpy()
    return found


def there(ref: WeightRef) -> None:
    """InfrastructureError unless the version is still there: what was read of it before was whole."""
    _index(ref)


def remove_stale(directory: str) -> list[str]:
    """Remove weight files in `directory` whose process on this host is gone; returns their names."""
    removed = []
    for path in sorted(Path(directory).glob(f"{_PREFIX}-*")):
        owner = path.name.removeprefix(f"{_PREFIX}-").rsplit("-", 1)[0]
        pid = owner.rsplit("-", 1)[-1]
        if pid.isdigit() and owner == _owner(int(pid)) and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _owner(pid: int) -> str:
    """Host, pid namespace and process: a pid means something only inside the namespace it was given in."""
    return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}-{pid}"


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a view where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _digest_entry(digest: Any, entry: _Entry, raw: memoryview | None) -> None:
    """Add an entry to the digest; the bytes of tied tensors count once."""
    digest.update(f"{entry.name}\0{entry.dtype}\0{entry.shape}\0{entry.offset}\0{entry.size}\0".encode())
    if raw is not None:
        digest.update(raw)


def _index(ref: WeightRef) -> dict[str, Any]:
    """The index, if it still is that of `ref`."""
    try:
        found: dict[str, Any] = json.loads(Path(ref.where).read_text())
    except FileNotFoundError:
        raise _unreadable(ref, "they are not there: being rewritten, or their publisher is gone") from None
    except (OSError, ValueError) as error:
        raise _unreadable(ref, f"their index cannot be read ({error})") from error
    if (found["version"], found["digest"]) != (ref.version, ref.digest):
        raise _unreadable(ref, f"version {found['version']} (digest {found['digest'][:12]}) is in their place")
    return found


def _open(ref: WeightRef) -> tuple[list[_Entry], Tensor]:
    index = _index(ref)
    entries = [_entry(e) for e in index["tensors"]]
    size = max((e.offset + e.size for e in entries if e.size), default=0)
    data = Path(ref.where).with_name(index["data"])
    try:
        if data.stat().st_size < size:
            raise _unreadable(ref, f"{data.name} has {data.stat().st_size} of {size} bytes")
        if size == 0:
            return entries, torch.empty(0, dtype=torch.uint8)
        return entries, torch.from_file(str(data), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise _unreadable(ref, f"{data.name} cannot be mapped ({error})") from error


def _entry(written: Mapping[str, Any]) -> _Entry:
    shape = tuple(written["shape"])
    return _Entry(written["name"], written["dtype"], shape, written["offset"], written["size"])


def _verify(ref: WeightRef, entries: list[_Entry], mapped: Tensor) -> None:
    digest, known = blake3(), dict[int, str]()
    whole = mapped.numpy().data
    for entry in entries:
        first = entry.size == 0 or known.setdefault(entry.offset, entry.name) == entry.name
        _digest_entry(digest, entry, whole[entry.offset : entry.offset + entry.size] if first else None)
    if digest.hexdigest() != ref.digest:
        raise _unreadable(ref, "their bytes do not have the digest they were published with")


def _views(ref: WeightRef, entries: list[_Entry], mapped: Tensor) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        dtype = getattr(torch, entry.dtype)
        raw = mapped[entry.offset : entry.offset + entry.size]
        yield entry.name, raw.view(dtype).reshape(entry.shape) if entry.size else torch.empty(entry.shape, dtype=dtype)
    _index(ref)  # still the same version: nothing was overwritten while it was read


def _unreadable(ref: WeightRef, why: str) -> InfrastructureError:
    return InfrastructureError(
        "RLKD-I601",
        f"weights of version {ref.version} (digest {ref.digest[:12]}) cannot be used: {why}",
        where=ref.where,
        fix="the worker is replaced and asks for the current version; if it is not on the learner's machine: "
        "sync.kind=auto (over the network), or sync.kind=disk with a path that both see",
    )


def _unwritable(directory: str, error: OSError) -> PreflightError:
    return PreflightError(
        "RLKD-E602",
        f"weights cannot be written: {error.strerror or error}",
        where=directory,
        fix="two versions of the weights must fit there: enlarge it (docker --shm-size), or sync.kind=disk",
    )
