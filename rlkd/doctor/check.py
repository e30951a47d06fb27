"""What a check of the doctor is."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do if it is not right."""

    name: str
    status: Status
    detail: str
    fix: str | None = None
