"""From the scores of an answer to its reward: the weighted sum, with its parts kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.core.ports import Reward


@dataclass(frozen=True)
class Mix:
    """r = Σ weight · score. A part that could not judge (None) makes the reward NaN: unjudged, never 0.

    Parts in `spare_zero` are added only where the sum of the others is not 0: AMPO's repetition penalty, which leaves
    a reward of 0 alone (algorithms.md §2.2).
    """

    weights: Mapping[str, float]
    spare_zero: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rewards: Mapping[str, Reward]) -> "Mix":
        spared = frozenset(name for name, r in rewards.items() if getattr(r, "spare_zero", False))
        return cls({name: r.weight for name, r in rewards.items()}, spared)

    def __call__(self, scores: Mapping[str, float | None]) -> tuple[dict[str, float], float]:
        """The parts as Sample.scores (NaN: could not judge) and the reward. `scores` must have every part."""
        parts = {name: math.nan if (s := scores[name]) is None else float(s) for name in self.weights}
        if any(math.isnan(s) for s in parts.values()):
            return parts, math.nan
        base = sum(self.weights[name] * s for name, s in parts.items() if name not in self.spare_zero)
        spared = sum(self.weights[name] * s for name, s in parts.items() if name in self.spare_zero)
        alone = len(self.spare_zero) == len(self.weights)  # with nothing else to spare, the penalty is the reward
        return parts, base + spared if alone or base != 0.0 else base
