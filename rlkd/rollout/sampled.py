"""The plain rollout: G answers of the policy to one prompt."""

from dataclasses import dataclass

from rlkd.core.ports import Knobs, Services, as_sample
from rlkd.core.types import Group, Prompt


@dataclass(frozen=True)
class Sampled:
    """G samples, drawn independently from the policy."""

    samples: int = 8  # G

    async def __call__(self, prompt: Prompt, ask: Services, knobs: Knobs) -> Group:
        completions = await ask.policy.generate(prompt.tokens, self.samples, prompt.seed)
        return Group(prompt, tuple(as_sample(prompt, c) for c in completions))
