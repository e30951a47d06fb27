"""The policy's answers to some prompts, worked answers by somebody else to the others (GKD)."""

from dataclasses import dataclass

import numpy as np

from rlkd.core.ports import Knobs, Services, as_demonstration
from rlkd.core.types import Group, Prompt
from rlkd.rollout.sampled import Sampled

STREAM = 2  # of prompt.seed: which of the two, and which demonstrations


@dataclass(frozen=True)
class Mixed(Sampled):
    """With probability λ a group of `samples` answers of the policy, else the prompt's demonstrations, at most
    `samples` of them. Which of the two depends on `prompt.seed` alone. A prompt that has none is answered by the policy
    after all; the run's report counts those.
    """

    on_policy: float = 1.0  # λ

    async def __call__(self, prompt: Prompt, ask: Services, knobs: Knobs) -> Group:
        rng = np.random.default_rng([prompt.seed, STREAM])
        if rng.random() < self.on_policy:
            return await super().__call__(prompt, ask, knobs)
        known = await ask.demonstrations(prompt)
        if not known:
            ask.report("no_demonstration", f"prompt {prompt.id} has no worked answer: the policy answers it")
            return await super().__call__(prompt, ask, knobs)
        chosen = sorted(rng.choice(len(known), min(self.samples, len(known)), replace=False).tolist())
        return Group(prompt, tuple(as_demonstration(prompt, known[i], (0, 0)) for i in chosen))
