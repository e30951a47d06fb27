"""A canary after a weight sync: fixed tokens, read by the learner and by every sampler.

The handshake of version and digest says which bytes a sampler was given. This says what it makes of them: a head that
was not refreshed, a prompt cache that still serves the old weights. One more sync is tried, then the run ends.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkd.core.errors import DivergedError
from rlkd.train.health import Bounds

Probe = Callable[[], Awaitable[Mapping[str, Any]]]  # the learner's {"tokens": […], "logp": [None, …]} at temperature 1
Readings = Callable[[np.ndarray], Awaitable[Mapping[str, Any]]]  # Pool.canary: by worker's name, its logp and cached


@dataclass(frozen=True)
class Off:
    """How far one worker is off, in nats on average."""

    worker: str
    learner: float  # from the learner's log-probs of the same tokens
    cached: float  # from itself, through its prompt cache; NaN: not known

    @property
    def worst(self) -> float:
        """NaN (a log-prob that is no number) counts as infinite; an unknown cache does not."""
        learner = math.inf if math.isnan(self.learner) else self.learner
        return max(learner, 0.0 if math.isnan(self.cached) else self.cached)

    def __str__(self) -> str:
        cache = "" if math.isnan(self.cached) else f", {self.cached:.3g} from itself through its prompt cache"
        return f"{self.worker} is off by {self.learner:.3g} nats from the learner{cache}"


def compare(learner: Sequence[float | None], readings: Mapping[str, Any]) -> list[Off]:
    """Of every worker, the worst first."""
    expected = np.array(learner[1:], np.float64)
    off = [
        Off(name, float(np.abs(np.asarray(r.logp[1:], np.float64) - expected).mean()), float(r.cached))
        for name, r in readings.items()
    ]
    return sorted(off, key=lambda o: -o.worst)


@dataclass
class Canary:
    """The loop's one call after a sync."""

    every: int  # steps; 0: never
    bounds: Bounds
    probe: Probe
    readings: Readings
    resync: Callable[[int], Awaitable[None]]  # Learner.publish
    tell: Callable[[str, str], None] = lambda *_: None

    async def check(self, step: int) -> float | None:
        """How far the worst worker is off; None if none was asked. DivergedError if it stays beyond the bound."""
        if not self.every or step % self.every:
            return None
        off = await self._off()
        if off is not None and off.worst > self.bounds.canary:
            self.tell("canary", f"step {step}: {off} (health.canary={self.bounds.canary:g}); weights are sent again")
            await self.resync(step)
            off = await self._off()
        if off is not None and off.worst > self.bounds.canary:
            raise DivergedError(
                "RLKD-T144",
                f"step {step}: after another weight sync {off}; health.canary={self.bounds.canary:g}",
                where=off.worker,
                fix="try sampler.prefix_caching=false, then sampler.engine=hf; report what `rlkd doctor` prints",
            )
        return off.worst if off is not None else None

    async def _off(self) -> Off | None:
        said = await self.probe()
        found = compare(said["logp"], await self.readings(np.array(said["tokens"], np.int32)))
        return found[0] if found else None
