"""Files as a crash leaves them: what was synced is there, what was renamed is there whole or not at all."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

CHUNK = 8 << 20  # bytes read at once


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable: those of new files, and what was renamed."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_part(path: Path, data: bytes) -> Path:
    """Write `data` beside `path` as `<name>.part`, synced. It becomes `path` by one `os.rename`."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return part


def digest(path: Path, sync: bool = False) -> tuple[int, str]:
    """Size in bytes and blake3 (hex) of a file, read in chunks; with `sync` it is on the disk when this returns.

    OSError (ELOOP for a link); ValueError for what is no regular file, which is never waited for.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no regular file")
        size, found = 0, blake3(max_threads=blake3.AUTO)
        while chunk := os.read(fd, CHUNK):
            size += len(chunk)
            found.update(chunk)
        if sync:
            os.fsync(fd)
        return size, found.hexdigest()
    finally:
        os.close(fd)


def walk(directory: Path) -> Iterator[tuple[str, str]]:
    """Everything under a directory, sorted: its path relative to it, and file, directory, link or special file.

    Links are not followed. OSError if a directory cannot be read.
    """
    for entry in sorted(os.scandir(directory), key=lambda e: e.name):
        if entry.is_symlink():
            yield entry.name, "link"
        elif entry.is_dir(follow_symlinks=False):
            yield entry.name, "directory"
            yield from ((f"{entry.name}/{name}", kind) for name, kind in walk(directory / entry.name))
        else:
            yield entry.name, "file" if entry.is_file(follow_symlinks=False) else "special file"


def in_words(size: int | float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
