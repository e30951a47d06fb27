"""What makes a folder a checkpoint: one file that names every other with its size and its blake3.

It is written last. A folder without it, or with a file that is not as it says, is no checkpoint.
"""

import errno
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from blake3 import blake3

from rlkd.core.errors import CheckpointError
from rlkd.core.faults import fault
from rlkd.store.disk import digest, sync_directory, walk, write_part

MANIFEST = "MANIFEST.json"
PART = MANIFEST + ".part"
FORMAT = 1
LARGEST = 64 << 20  # bytes of a manifest; more is not read
_KEYS = {"format", "step", "files", "facts", "digest"}
_HASH = re.compile(r"[0-9a-f]{64}")
_NOT_READABLE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)  # the file's fault, not the access


@dataclass(frozen=True)
class File:
    path: str  # relative to the checkpoint, parts joined by /
    size: int  # bytes
    blake3: str  # hex


@dataclass(frozen=True)
class Manifest:
    """`facts` is what the caller committed with the files; `digest` is over everything else in the manifest."""

    format: int
    step: int
    files: tuple[File, ...]
    facts: Mapping[str, Any]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def score(self) -> float | None:
        """By which the best checkpoints are kept: the number `facts["score"]`; None if there is none."""
        score = self.facts.get("score")
        return float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None


class OtherFormat(CheckpointError):
    """An undamaged manifest of another format: of a newer rlkd."""


def written(directory: Path, step: int, facts: Mapping[str, Any]) -> Manifest:
    """The manifest of what is in `directory`, all of it hashed and durable; the manifest itself is not written yet.

    ValueError for a link or anything else that is no file, for a name that cannot be in a manifest, and for facts that
    are no json (NaN and infinities become null). OSError as it comes.
    """
    for left in (MANIFEST, PART):  # of a try to commit before
        (directory / left).unlink(missing_ok=True)
    files, directories = [], [directory]
    for name, kind in walk(directory):
        if kind == "directory":
            directories.append(directory / name)
            continue
        if kind != "file":
            raise ValueError(f"{directory / name} is a {kind}: a checkpoint holds files only")
        if why := unsafe(name):
            raise ValueError(f"{name!r} cannot be the name of a checkpoint's file: {why}")
        fault("commit.file")
        files.append(File(name, *digest(directory / name, sync=True)))
    for inner in reversed(directories):
        sync_directory(inner)
    content = {"format": FORMAT, "step": step, "files": [asdict(f) for f in files], "facts": _plain(facts)}
    content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: keys are text
    return Manifest(FORMAT, step, tuple(files), content["facts"], _digest(content))


def save(directory: Path, manifest: Manifest) -> None:
    """Put the manifest into the directory: whole or not at all, and durable."""
    part = write_part(directory / MANIFEST, as_bytes(manifest))
    fault("commit.after_part")
    os.rename(part, directory / MANIFEST)
    fault("commit.after_manifest")
    sync_directory(directory)


def as_bytes(manifest: Manifest) -> bytes:
    return json.dumps(asdict(manifest), indent=1, allow_nan=False).encode()


def read(directory: Path) -> Manifest:
    """The manifest in `directory`; its files are not looked at. CheckpointError RLKD-K010 with what is wrong with it,
    OtherFormat if only its format is; OSError if it may not be read (permissions, network)."""
    path = directory / MANIFEST
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as f:
            data = f.read(LARGEST + 1)
    except OSError as e:
        if e.errno not in _NOT_READABLE:
            raise
        raise _unreadable(str(path), str(e.strerror)) from e
    return parse(data, str(path))


def parse(data: bytes, where: str = MANIFEST) -> Manifest:
    """A manifest's text, checked entirely: names, sizes, hashes, its digest. Errors as `read`."""
    if len(data) > LARGEST:
        raise _unreadable(where, f"it is over {LARGEST >> 20} MiB")
    try:
        content = json.loads(data, parse_constant=_no_constant)
        if not isinstance(content, dict) or not isinstance(content.get("digest"), str):
            raise ValueError("it is no manifest")
        if _digest({k: v for k, v in content.items() if k != "digest"}) != content["digest"]:
            raise ValueError("it was changed after it was written")
        if content.get("format") != FORMAT or isinstance(content["format"], bool):
            raise OtherFormat(
                "RLKD-K011",
                f"this checkpoint has format {str(content.get('format'))[:40]}, and this rlkd reads format {FORMAT}",
                where=where,
                fix="use the rlkd that wrote it; nothing was changed",
            )
        return _checked(content)
    except (ValueError, RecursionError) as e:
        raise _unreadable(where, "it is nested too deeply" if isinstance(e, RecursionError) else str(e)) from e


def problems(directory: Path, manifest: Manifest, content: bool = True) -> list[str]:
    """What is not as the manifest says, a line each: a file that is missing, too short, changed, not named, no file.

    Without `content` the bytes are not read: a changed byte is not found. OSError if they may not be read.
    """
    kinds = dict(walk(directory))
    found = [f"{name}: is a {kind}, not a file" for name, kind in kinds.items() if kind not in ("file", "directory")]
    for file in manifest.files:
        if kinds.get(file.path) == "file":
            found += _file_problem(directory / file.path, file, content)
        elif kinds.get(file.path) in (None, "directory"):
            found.append(f"{file.path}: is missing")
    known = {f.path for f in manifest.files} | {MANIFEST}
    return found + [f"{n}: is not in the manifest" for n, kind in kinds.items() if kind == "file" and n not in known]


def unsafe(path: str) -> str | None:
    """Why a name cannot be that of a file in a checkpoint; None if it can."""
    parts = path.split("/")
    if not path or "\0" in path or len(path) > 4096 or any(len(p) > 255 for p in parts):
        return "it is empty, too long, or has a NUL in it"
    if path.startswith("/") or any(p in ("", ".", "..") for p in parts):
        return "it leads out of the checkpoint"
    return "it is the manifest's own" if path in (MANIFEST, PART) else None


def _file_problem(path: Path, file: File, content: bool) -> list[str]:
    try:
        size, found = digest(path) if content else (path.lstat().st_size, file.blake3)
    except OSError as e:
        if e.errno not in _NOT_READABLE:
            raise
        return [f"{file.path}: {e.strerror}"]
    if size != file.size:
        return [f"{file.path}: has {size} bytes, not {file.size}"]
    return [f"{file.path}: its content was changed"] if found != file.blake3 else []


def _checked(content: Mapping[str, Any]) -> Manifest:
    if content.keys() != _KEYS or not isinstance(content["files"], list) or not isinstance(content["facts"], dict):
        raise ValueError("it is no manifest")
    if not _count(content["step"]):
        raise ValueError(f"its step is {str(content['step'])[:40]}")
    files = tuple(_file(f) for f in content["files"])
    names = {f.path for f in files}
    if len(names) != len(files):
        raise ValueError("it names a file twice")
    for name in names:
        if why := unsafe(name):
            raise ValueError(f"it names {name[:200]!r}: {why}")
        parts = name.split("/")
        if any("/".join(parts[:n]) in names for n in range(1, len(parts))):
            raise ValueError(f"it names {name[:200]!r} and a file where its folder is")
    return Manifest(FORMAT, content["step"], files, content["facts"], content["digest"])


def _file(entry: Any) -> File:
    if not isinstance(entry, dict) or entry.keys() != {"path", "size", "blake3"}:
        raise ValueError("an entry of `files` is none")
    path, size, found = entry["path"], entry["size"], entry["blake3"]
    if not isinstance(path, str) or not _count(size) or not isinstance(found, str) or not _HASH.fullmatch(found):
        raise ValueError("an entry of `files` is none")
    return File(path, size, found)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _digest(content: Mapping[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """As json: numpy's numbers as Python's, and those that json does not have as null."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(v) for v in value]
    raise ValueError(f"a checkpoint's facts are json, and {type(value).__name__} is not: {str(value)[:80]}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has {name} in it")


def _unreadable(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        "RLKD-K010",
        f"the checkpoint's manifest cannot be used: {why}",
        where=where,
        fix="use another checkpoint; `rlkd ckpt verify` says which are whole",
    )
