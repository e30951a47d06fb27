"""One key's distribution, as in Ray Tune: `{loguniform: [1e-6, 1e-4]}`, `{choice: [4, 8]}`.

uniform [low, high]        any number between             loguniform [low, high]     each power of ten as likely
quniform [low, high, q]    a multiple of q                qloguniform [low, high, q]
randint [low, high]        a whole number below high      lograndint [low, high]
qrandint [low, high, q]    a multiple of q, high too      normal [mean, deviation]   within 4 deviations
choice [a, b, …]           one of these                   grid [a, b, …]             each of these
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlkd.config.recipe import IMPLICIT

LISTS = ("choice", "grid")
WHOLE = ("randint", "lograndint", "qrandint")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "uniform": ("low", "high"),
    "quniform": ("low", "high", "q"),
    "loguniform": ("low", "high"),
    "qloguniform": ("low", "high", "q"),
    "randint": ("low", "high"),
    "lograndint": ("low", "high"),
    "qrandint": ("low", "high", "q"),
    "normal": ("mean", "deviation"),
}
KINDS = (*ARGUMENTS, *LISTS)
FAR = 4.0  # deviations: what a normal distribution is cut at


@dataclass(frozen=True)
class Spec:
    """`values` are the arguments of a distribution, or what a choice or grid chooses from."""

    kind: str
    values: tuple[Any, ...]

    def problem(self) -> str | None:
        """Why this can be no distribution; None if it can."""
        if self.kind in LISTS:
            return None if self.values else f"`{self.kind}` has nothing to choose from"
        names = ARGUMENTS[self.kind]
        how = f"{{{self.kind}: [{', '.join(names)}]}}"
        if len(self.values) != len(names):
            return f"`{self.kind}` takes {len(names)} numbers, {how}, not {len(self.values)}"
        for name, value in zip(names, self.values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return f"`{self.kind}`: {name} must be a number, not {json.dumps(value, default=str)}"
            if self.kind in WHOLE and not isinstance(value, int):
                return f"`{self.kind}`: {name} must be a whole number, not {value}"
        if self.kind == "normal":
            return None if self.values[1] > 0 else "`normal`: the deviation must be above 0"
        low, high, *q = self.values
        if low >= high:
            return f"`{self.kind}`: low={low} must be below high={high}"
        if "log" in self.kind and low <= 0:
            return f"`{self.kind}`: low={low} must be above 0, or it has no logarithm"
        if q and not 0 < q[0] <= high - low:
            return f"`{self.kind}`: q={q[0]} must be above 0 and at most high − low"
        if q and any(abs(end / q[0] - round(end / q[0])) > 1e-6 for end in (low, high)):
            return f"`{self.kind}`: low={low} and high={high} must be multiples of q={q[0]}"
        return None

    def corners(self) -> list[Any]:
        """The extreme values that may come out, or all of a list."""
        if self.kind in LISTS:
            return list(self.values)
        low, high = self._ends()
        return [low, high - 1] if self.kind in ("randint", "lograndint") else [low, high]

    def _ends(self) -> tuple[Any, Any]:
        if self.kind == "normal":
            mean, deviation = map(float, self.values)
            return mean - FAR * deviation, mean + FAR * deviation
        low, high = self.values[:2]
        return (low, high) if self.kind in WHOLE else (float(low), float(high))

    def nearest(self, value: Any) -> Any:
        """The closest value that may come out: PBT multiplies what it has by 0.8 or 1.2, and `normal` has no ends."""
        if self.kind in LISTS:
            return value if value in self.values else self.values[0]
        low, high = self.corners()
        if self.kind in ("quniform", "qloguniform", "qrandint"):
            value = round(value / self.values[2]) * self.values[2]
        value = min(max(value, low), high)
        return round(value) if self.kind in WHOLE else float(value)

    def __str__(self) -> str:
        return f"{self.kind} {written(list(self.values))}"


def written(value: Any) -> str:
    """The value as it stands behind `key=` on a command line; numpy's numbers as Python's."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, str):
        return value if _plain(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def overrides(values: Mapping[str, Any]) -> list[str]:
    """`key=value` for each."""
    return [f"{key}={written(value)}" for key, value in values.items()]


def _plain(text: str) -> bool:
    """Whether text stays text when it is read back without quotes."""
    return bool(text) and text[0] not in "[{\"'" and not any(pattern.match(text) for _, pattern, _ in IMPLICIT)


def combinations(specs: Mapping[str, Spec], most: int, seed: int = 0) -> list[dict[str, Any]]:
    """All at their first corners, all at their last, and some between by a seed: `most` at most, each once."""
    draw = random.Random(seed)
    corners: dict[str, Sequence[Any]] = {key: spec.corners() for key, spec in specs.items()}
    found = [{key: values[0] for key, values in corners.items()}, {key: values[-1] for key, values in corners.items()}]
    found += [{key: draw.choice(values) for key, values in corners.items()} for _ in range(4 * most)]
    distinct = {json.dumps(one, default=str): one for one in found}
    return list(distinct.values())[:most]
