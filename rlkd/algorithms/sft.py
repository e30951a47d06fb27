"""SFT — supervised fine-tuning on demonstrations: maximum likelihood of what somebody else wrote.

    L(θ) = −1/M Σ_i Σ_t log π_θ(τ_i,t | q, τ_i,<t)            norm: token, over all M tokens of the step
    L(θ) = −1/N Σ_i 1/|τ_i| Σ_t log π_θ(τ_i,t | q, τ_i,<t)    norm: sequence

The demonstrations are those stored with the prompt and, with `live`, texts of the recipe's teachers. Nothing is
sampled; rewards are only looked at where `rollout.only_right` asks for them. A prompt without a demonstration gives a
group without samples, which the loop turns away and counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool

from rlkd.core.batch import MicroBatch
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.types import Group, Origin, Signal
from rlkd.guidance import NoGuidance
from rlkd.rollout.traced import Traced


@dataclass(frozen=True)
class Imitation:
    """Maximum likelihood of the tokens of one origin; whose, a subclass says."""

    name: str = ""
    norm: Literal["token", "sequence"] = "token"
    guidance: NoGuidance = field(default_factory=NoGuidance)
    whole_groups: ClassVar[bool] = False
    top_k: ClassVar[int] = 0
    trained: ClassVar[Origin]

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def knobs(self, step: int, last: Knobs) -> Knobs:
        return {}

    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]:
        return np.zeros(len(group.samples), bool)

    def credit(self, group: Group) -> Group:
        return group

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        return groups

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        metrics = {
            "nll": x.mean(-pi.logp.detach(), self.trained),  # nats a token
            "entropy": x.mean(pi.entropy.detach(), self.trained),
        }
        return Loss(x.mean(-pi.logp, self.trained, self.norm), metrics)


@dataclass(frozen=True)
class SFT(Imitation):
    name: str = "sft"
    live: bool = False  # ask the recipe's teachers for worked answers too
    rollout: Traced = field(default_factory=Traced)
    trained: ClassVar[Origin] = Origin.TEACHER

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.TEACHER_TEXT} if self.live else ())

    def problems(self) -> list[str]:
        few = self.rollout.samples < 1
        return [f"rollout.samples={self.rollout.samples} must be at least 1"] if few else []
