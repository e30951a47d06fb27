"""The rollout that samples nothing: the group is what others wrote."""

from dataclasses import dataclass

import numpy as np

from rlkd.core.ports import Knobs, Services, as_demonstration
from rlkd.core.types import Group, Prompt

UNWRITTEN = (0, 0)  # versions of a group into which no policy wrote


@dataclass(frozen=True)
class Traced:
    """The prompt's demonstrations: `ask.traces`' where the run has them (stored, and live teachers' texts), else those
    stored with the prompt. A prompt without any gives a group without samples, and says so.

    Of more than `samples` demonstrations each occurrence of the prompt draws others, without replacement, from the
    prompt's seed. With `only_right` the verifier is asked first; one nobody could judge is not right.
    """

    samples: int = 1  # at most
    only_right: bool = False
    success: float = 0.5  # a reward above this is right

    async def __call__(self, prompt: Prompt, ask: Services, knobs: Knobs) -> Group:
        found = await ask.demonstrations(prompt)
        samples = tuple(as_demonstration(prompt, d, UNWRITTEN) for d in found)
        if not samples:
            ask.report("traces", f"prompt {prompt.id} has no demonstration")
        elif self.only_right:
            samples = tuple(s for s in await ask.verify(prompt, samples) if s.reward > self.success)
            if not samples:
                ask.report("traces", f"prompt {prompt.id}: none of its {len(found)} demonstrations is right")
        if len(samples) > self.samples:
            drawn = np.random.default_rng(prompt.seed).choice(len(samples), self.samples, replace=False)
            samples = tuple(samples[i] for i in sorted(drawn))
        return Group(prompt, samples)
