"""ThinkTuning — a teacher of the student's own size gives feedback on its answers. RS et al. 2025, arXiv:2508.07616.

Per prompt G answers of the student; k = max(1, ⌊E·pct⌋) of the E finished ones are continued by a teacher that sees the
question and the answer, never the solution (guidance/feedback.py), and are judged again. Then, over all G rows,

    Â_i = (r_i − mean(r)) / std(r)
    ℓ_t = dual-clipped PPO (ε = .2, c = 3)                                       the student's tokens
    ℓ_t = −Â·w_t,  w = p/d,  d = sg[p] + γ(Â), no clip                           the teacher's: AAS (core/aas.py),
          w = π/sg[π]                                                            where Â < 0 and p < .01
    L   = mean of ℓ over all tokens

pct falls (guidance/teaching.py) until the teacher is off for good; from then on the steps are GRPO's.

Deviations of the released code from the text, and what is done here. (1) Its clamp of γ has its bounds in the wrong
order, so γ ≡ −.001; here they are sorted. (2) It marks the whole spliced answer as guided, the student's own tokens
too; here only what the teacher wrote (`guidance.mask_scope`). (3) It cuts rows at the right when they are too long, so
that they lose their end token and their reward; here such a row stays the student's. (4) It draws the rows from the
wall clock; here from the prompt's seed. `official_compat` reproduces 1 to 3. Not reproduced: the question's instruction
asked twice, texts tokenised again after the splice (here token ids are put together), an AAS loss that nothing calls,
and a dual clip that is off without guidance (here it is always on). With 5 answers and pct < .4 it is one row of five,
whatever pct says.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core.aas import AAS
from rlkd.core.batch import MicroBatch, Norm
from rlkd.core.ports import Knobs, Loss, PolicyOutput
from rlkd.core.types import TRAINED, Origin, Signal
from rlkd.guidance.feedback import PCT, Feedback
from rlkd.guidance.teaching import Teaching
from rlkd.rollout import Sampled


@dataclass(frozen=True)
class ThinkTuning(GRPO):
    name: str = "thinktuning"
    dual_clip: float | None = 3.0  # c
    norm: Norm = "token"
    rollout: Sampled = field(default_factory=lambda: Sampled(samples=5))
    guidance: Feedback = field(default_factory=Feedback)  # type: ignore[assignment]
    teaching: Teaching = field(default_factory=Teaching)  # pct(t)
    aas: AAS = field(default_factory=AAS)  # γ(A)
    official_compat: bool = False  # sets guidance.mask_scope=row and over_long=cut, and γ ≡ gamma_max
    trained: ClassVar[Origin] = TRAINED

    def __post_init__(self) -> None:
        if self.official_compat:
            over_long = "cut" if self.guidance.max_tokens is not None else self.guidance.over_long
            guidance = replace(self.guidance, mask_scope="row", over_long=over_long)
            object.__setattr__(self, "guidance", guidance)

    @property
    def needs(self) -> frozenset[Signal]:
        return super().needs | {Signal.TEACHER_TEXT}

    def problems(self) -> list[str]:
        found = super().problems()
        found += [f"guidance.{problem}" for problem in self.guidance.problems()]
        found += [f"teaching.{problem}" for problem in self.teaching.problems()]
        return found + [f"aas.{problem}" for problem in self.aas.problems()]

    def knobs(self, step: int, last: Knobs) -> Knobs:
        return {**super().knobs(step, last), PCT: self.teaching.at(step)}

    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss:
        found = super().loss(pi, x, knobs)
        if not x.totals.tokens[int(Origin.TEACHER)]:
            return found
        logp = pi.logp.detach()
        weight = self.aas.weight(logp, x.advantage, self.official_compat)
        metrics = {
            "teacher_probability": x.mean(torch.exp(logp), Origin.TEACHER),
            "aas_weight": x.mean(weight, Origin.TEACHER),
        }
        return replace(found, metrics={**found.metrics, **metrics})

    def surrogate(
        self, rho: Float[Tensor, "t"], a: Float[Tensor, "t"], pi: PolicyOutput, x: MicroBatch
    ) -> Float[Tensor, "t"]:
        own = super().surrogate(rho, a, pi, x)
        shaped = -x.advantage * self.aas.weight(pi.logp, x.advantage, self.official_compat)
        return torch.where(x.mask(Origin.TEACHER), shaped, own)
