"""A folder that appears whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlkd.core.errors import PreflightError


def check_free(directory: Path) -> None:
    """Raises PreflightError unless `directory` is absent or an empty folder."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        what = "a folder with other things in it" if directory.is_dir() else "not a folder"
        raise PreflightError(
            "RLKD-E703",
            f"cannot write the model there: it is {what}",
            where=str(directory),
            fix="give a new or an empty folder; nothing was changed",
        )


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder beside `directory`, which becomes `directory` when the block ends without an error.

    Raises PreflightError if something is at `directory` when the block begins or, put there by somebody else, when it
    ends, or if the folder cannot be made.
    """
    directory = directory.resolve()
    check_free(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-partial-")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    with scratch:
        folder = Path(scratch.name) / "whole"
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes 0600; workers of other users read the folder too
        check_free(directory)
        try:
            folder.replace(directory)
        except OSError as error:
            raise _cannot_write(directory, error) from error


def _cannot_write(directory: Path, error: OSError) -> PreflightError:
    return PreflightError(
        "RLKD-E704",
        f"cannot write a folder there: {error.strerror}",
        where=str(directory),
        fix="give a directory that you may write to",
    )
