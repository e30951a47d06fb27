"""DPO — Direct Preference Optimization, online. Rafailov et al. 2023, arXiv:2305.18290.

    h(θ) = log π_θ(y_w|q)/π_ref(y_w|q) − log π_θ(y_l|q)/π_ref(y_l|q)
    L(θ) = −log σ(β h)                                                                                      Eq. 7
    cDPO   −(1−ε) log σ(β h) − ε log σ(−β h)        label smoothing: a pair is the wrong way round with probability ε
    IPO    (h − 1/(2β))²                            Azar et al. 2023, arXiv:2310.12036, Eq. 17 (their τ is β)

The paper learns from a fixed set of human choices. Here the pair is made anew for each prompt: y_w is the answer of the
group with the largest reward, y_l the one with the smallest (of equals the first); with `guidance.demonstrations`, y_w
is a demonstration, if it earns more than y_l. A group without contrast is turned away. log π(y|q) is a sum over tokens;
`length_normalised` takes the mean, so that long answers weigh no more than short ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlkd.core.advantage import with_advantages
from rlkd.core.batch import MicroBatch
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.types import TRAINED, Finish, Group, Signal
from rlkd.guidance.shown import Shown
from rlkd.rollout import Sampled


@dataclass(frozen=True)
class DPO:
    name: str = "dpo"
    beta: float = 0.1  # β
    label_smoothing: float = 0.0  # ε of cDPO
    ipo: bool = False
    length_normalised: bool = False
    live: bool = False  # ask the recipe's teachers for worked answers too
    rollout: Sampled = field(default_factory=Sampled)
    guidance: Shown = field(default_factory=Shown)
    whole_groups: ClassVar[bool] = True
    top_k: ClassVar[int] = 0

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.REFERENCE, *([Signal.TEACHER_TEXT] if self.live else [])})

    def problems(self) -> list[str]:
        found = [f"guidance.{problem}" for problem in self.guidance.problems()]
        if self.beta <= 0:
            found.append(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.ipo and self.label_smoothing:
            found.append("label_smoothing is of the sigmoid loss, and ipo=true has another")
        if self.live and not self.guidance.demonstrations:
            found.append("live=true asks teachers for demonstrations, and guidance.demonstrations=0 uses none")
        least = 1 if self.guidance.demonstrations else 2
        if self.rollout.samples < least:
            found.append(f"rollout.samples={self.rollout.samples}: a pair needs at least {least}")
        return found

    def knobs(self, step: int, last: Knobs) -> Knobs:
        return {}

    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]:
        """The pair alone: nobody pays for the others."""
        wanted = np.zeros(len(group.samples), bool)
        wanted[list(self.pair(group) or ())] = True
        return wanted

    def pair(self, group: Group) -> tuple[int, int] | None:
        """Places of y_w and y_l; None without contrast. What was broken off, or is empty, is neither."""
        usable = [i for i, s in enumerate(group.samples) if s.answer_tokens and s.finish != Finish.ABORTED]
        own = [i for i in usable if not group.samples[i].guided]
        if not own:
            return None
        rewards = group.rewards
        shown = [i for i in usable if group.samples[i].guided]
        chosen, rejected = max(shown or own, key=lambda i: rewards[i]), min(own, key=lambda i: rewards[i])
        return (chosen, rejected) if rewards[chosen] > rewards[rejected] else None

    def credit(self, group: Group) -> Group:
        """The pair, y_w marked by advantage 1 and y_l by −1; a group without contrast is left without samples."""
        pair = self.pair(group)
        if pair is None:
            return replace(group, samples=())
        both = replace(group, samples=tuple(group.samples[i] for i in pair))
        return with_advantages(both, np.array([1.0, -1.0]))

    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]:
        return groups

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        """A pair is two samples of the step's 2N, so a mean over samples of their pair's value is one over pairs."""
        log_ratio = x.per_sequence(
            pi.logp - x.required("reference_logp"), TRAINED, "mean" if self.length_normalised else "sum"
        )
        sign = x.per_sequence(x.advantage, TRAINED)  # 1 for y_w, −1 for y_l
        groups, pair = torch.unique(x.group, return_inverse=True)
        h = torch.zeros(len(groups), dtype=log_ratio.dtype, device=log_ratio.device)
        h = h.index_add(0, pair, sign * log_ratio)
        margin = h.detach()[pair]
        metrics = {
            "margin": x.share(margin),  # h, in nats
            "accuracy": x.share((margin > 0).to(h.dtype)),  # of pairs: y_w gained more than y_l
            "chosen_log_ratio": 2 * x.share(torch.where(sign > 0, log_ratio.detach(), 0.0)),  # below 0: y_w loses, too
            "entropy": x.mean(pi.entropy.detach(), TRAINED),
        }
        return Loss(x.share(self.of_pair(h)[pair]), metrics)

    def of_pair(self, h: Float[Tensor, "g"]) -> Float[Tensor, "g"]:
        if self.ipo:
            return (h - 1 / (2 * self.beta)).square()
        scaled = self.beta * h
        return -(1 - self.label_smoothing) * logsigmoid(scaled) - self.label_smoothing * logsigmoid(-scaled)
