"""`rlkd explain CODE`: what an error code means, what it ends with, and what to do. The text is errors.md's beside this
file; a test holds it to the codes that the source says, and where."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkd.core import errors
from rlkd.core.errors import ConfigError, RlkdError, nearest

TABLE = Path(__file__).with_name("errors.md")
ROW = re.compile(r"^\| (RLKD-[A-Z]\d{3}) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
KINDS: Mapping[str, type[RlkdError]] = {
    "C": errors.ConfigError,
    "D": errors.DataError,
    "E": errors.PreflightError,
    "I": errors.InfrastructureError,
    "K": errors.CheckpointError,
    "T": errors.DivergedError,
}


@dataclass(frozen=True)
class Meaning:
    code: str
    means: str
    fix: str
    said_by: tuple[str, ...]  # paths below rlkd/

    @property
    def exit_code(self) -> int:
        """By the letter; a row says so where there is another one besides."""
        return KINDS[self.code[5]].exit_code

    def text(self) -> str:
        kind = " ".join((KINDS[self.code[5]].__doc__ or "").split()).partition(" (")[0]
        said_by = ", ".join(f"rlkd/{path}" for path in self.said_by)
        what = f"{self.code}: {self.means}\n  what to do: {self.fix}"
        return f"{what}\n  exit code {self.exit_code}: {kind}\n  in: {said_by}"


def table() -> dict[str, Meaning]:
    """code → meaning, in the order of the table."""
    rows = ROW.findall(TABLE.read_text(encoding="utf-8"))
    return {code: Meaning(code, means, fix, tuple(by.replace("`", "").split(", "))) for code, means, fix, by in rows}


def explain(code: str | None) -> dict[str, Any]:
    """One code (also without `RLKD-`, in small letters), or all. ConfigError RLKD-C415 if there is none such."""
    known = table()
    if code is None:
        lines = [f"{m.code}  exit {m.exit_code}  {m.means}" for m in known.values()]
        return {"codes": [_plain(m) for m in known.values()], "text": "\n".join(lines)}
    wanted = "RLKD-" + code.strip().upper().removeprefix("RLKD-")
    if wanted not in known:
        close = nearest(wanted.removeprefix("RLKD-"), [k.removeprefix("RLKD-") for k in known])
        fix = (f"did you mean RLKD-{close}?  " if close else "") + "`rlkd explain` lists all"
        raise ConfigError("RLKD-C415", f"there is no error code {code!r}", where="command line", fix=fix)
    return {**_plain(known[wanted]), "text": known[wanted].text()}


def _plain(meaning: Meaning) -> dict[str, Any]:
    return {**asdict(meaning), "exit_code": meaning.exit_code}
