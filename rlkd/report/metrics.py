"""Numbers of a step. Those of the policy's own answers come from every finished group, before any is turned away: the
reward of only those worth training on would be a flattering curve. A sample a teacher had a hand in counts apart, and
an answer that gave way to it counts all the same.

reward/mean, reward/std    the policy's own answers; reward/guided: those with help
right                      share of the policy's own answers with a reward above `success`
score/NAME                 mean of the reward's parts
length/mean, length/max    tokens an answer has
truncated, aborted         share of answers that hit the length limit, that were cut off for other reasons
unjudged                   answers no verifier could judge; they are in none of the above
verifier_disagreement      of answers judged twice so far, the share with other scores (verifier.recheck_fraction)
guided                     share of samples with tokens of a teacher
groups/finished            groups with rewards since the last step; of them (share):
groups/all_right, groups/all_wrong, groups/mixed
group_seconds/STAGE        seconds one group spent in a stage: mean, and /max
batch/…                    what was trained: groups, samples, tokens (those whose log-prob counts), reward
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlkd.core.types import TRAINED, Finish, Group, Origin


@dataclass
class Observed:
    """What came from the rollout workers since the last step, as numbers: no sample is kept."""

    success: float
    groups: int = 0
    samples: int = 0  # judged, of finished groups
    unjudged: int = 0
    aborted: int = 0
    truncated: int = 0
    rewards: list[float] = field(default_factory=list)
    guided_rewards: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=lambda: {"all_right": 0, "all_wrong": 0, "mixed": 0})
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, group: Group, seconds: Mapping[str, float]) -> None:
        """A group with its rewards, and the seconds it took per stage."""
        self.groups += 1
        for stage, s in seconds.items():
            self.seconds.setdefault(stage, []).append(s)
        judged = [s for s in group.samples if not math.isnan(s.reward)]
        self.samples += len(judged)
        self.unjudged += len(group.samples) - len(judged)
        self.guided_rewards += [s.reward for s in judged if s.guided]
        own = [s for s in group.own if not math.isnan(s.reward)]
        for sample in own:
            self.rewards.append(sample.reward)
            self.lengths.append(sample.answer_tokens)
            self.truncated += sample.finish == Finish.LENGTH
            self.aborted += sample.finish == Finish.ABORTED
            for name, score in sample.scores.items():
                self.scores.setdefault(name, []).append(score)
        if own:
            right = sum(s.reward > self.success for s in own)
            self.outcomes["all_right" if right == len(own) else "mixed" if right else "all_wrong"] += 1

    def row(self) -> dict[str, float]:
        """The numbers by name; NaN for what nothing is known of."""
        own, guided = len(self.rewards), len(self.guided_rewards)
        row = {
            "reward/mean": _mean(self.rewards),
            "reward/std": float(np.std(self.rewards)) if own else math.nan,
            "right": _mean([r > self.success for r in self.rewards]),
            "length/mean": _mean(self.lengths),
            "length/max": float(max(self.lengths, default=math.nan)),
            "truncated": self.truncated / own if own else math.nan,
            "aborted": self.aborted / own if own else math.nan,
            "unjudged": float(self.unjudged),
            "guided": guided / self.samples if self.samples else math.nan,
            "groups/finished": float(self.groups),
        }
        if guided:
            row["reward/guided"] = _mean(self.guided_rewards)
        outcomes = sum(self.outcomes.values())
        row |= {f"groups/{kind}": n / outcomes if outcomes else math.nan for kind, n in self.outcomes.items()}
        row |= {f"score/{name}": _mean([v for v in vs if not math.isnan(v)]) for name, vs in self.scores.items()}
        for stage, seconds in self.seconds.items():
            row |= {f"group_seconds/{stage}": _mean(seconds), f"group_seconds/{stage}/max": max(seconds)}
        return row


def of_batch(groups: Sequence[Group]) -> dict[str, float]:
    """The numbers of the groups one step trained on."""
    samples = [s for g in groups for s in g.samples]
    return {
        "batch/groups": float(len(groups)),
        "batch/samples": float(len(samples)),
        "batch/tokens": float(sum(int(((s.origin & int(TRAINED)) != 0).sum()) for s in samples)),
        "batch/reward": _mean([s.reward for s in samples if not math.isnan(s.reward)]),
    }


def newest_version(groups: Sequence[Group]) -> int | None:
    """The newest policy that wrote into any of the samples; None if none did."""
    written = (s for g in groups for s in g.samples if (s.origin == Origin.POLICY).any())
    return max((s.versions[1] for s in written), default=None)


def _mean(values: Sequence[float] | Sequence[int] | Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
