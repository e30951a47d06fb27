"""Demonstrations beside the policy's own answers."""

from dataclasses import dataclass, replace

import numpy as np

from rlkd.core.ports import Knobs, Services, as_demonstration
from rlkd.core.types import Group


@dataclass(frozen=True)
class Shown:
    """Adds up to `demonstrations` of the prompt's demonstrations to the group, with the reward they earn; 0: none.

    They come from `ask.traces`, or are those stored with the prompt; of more than that many, the prompt's seed draws.
    A prompt without any, and one that nobody could judge, is reported, and nothing is added.
    """

    demonstrations: int = 0

    def problems(self) -> list[str]:
        few = self.demonstrations < 0
        return [f"demonstrations={self.demonstrations} must not be negative"] if few else []

    async def __call__(self, group: Group, ask: Services, knobs: Knobs) -> Group:
        if not self.demonstrations or not group.samples:
            return group
        prompt = group.prompt
        found = await ask.demonstrations(prompt)
        if not found:
            ask.report("guidance", f"prompt {prompt.id} has no demonstration")
            return group
        rng = np.random.default_rng(prompt.seed)
        drawn = sorted(rng.choice(len(found), min(self.demonstrations, len(found)), replace=False))
        judged = await ask.verify(prompt, tuple(as_demonstration(prompt, found[i], group.versions) for i in drawn))
        shown = tuple(s for s in judged if not np.isnan(s.reward))
        if len(shown) < len(judged):
            ask.report("guidance", f"prompt {prompt.id}: {len(judged) - len(shown)} demonstrations could not be judged")
        return replace(group, samples=(*group.samples, *shown))
