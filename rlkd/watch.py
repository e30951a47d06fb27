"""Somebody who follows a run from another thread of its process: a trial of a sweep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rlkd.config.schema import Config
from rlkd.core.stop import Stop


@dataclass(frozen=True)
class Watch:
    """May ask the run to stop, and hears of every evaluation: the run's config, the step, the metrics."""

    stop: Stop = field(default_factory=Stop)
    evaluated: Callable[[Config, int, Mapping[str, float]], None] = lambda *_: None  # in the run's own thread
