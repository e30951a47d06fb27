"""Held-out evaluation: pass@k of the policy as it is now, on prompts that are never trained on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlkd.core.errors import WorkerLost
from rlkd.core.ports import Sampling, Services, as_sample
from rlkd.core.together import together
from rlkd.core.types import Prompt, Sample
from rlkd.train.passk import Evaluation, evaluation

ATTEMPTS = 3  # of one prompt, when its worker is lost


@dataclass
class Evaluator:
    """Evaluates `prompts` with `samples` answers each; tells `report` of every result."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    samples: int = 1
    k: tuple[int, ...] = (1,)
    success: float = 0.5  # a reward above this is right
    every: int = 0  # steps; 0: not in between
    start: bool = True
    end: bool = True
    seed: int = 0
    tell: Callable[[int, Evaluation], None] | None = None
    results: dict[int, Evaluation] = field(default_factory=dict)

    async def at_start(self, ask: Services) -> None:
        if self.start:
            await self.run(0, ask)

    async def if_due(self, step: int, steps: int, ask: Services) -> None:
        if (self.end and step == steps) or (self.every and step % self.every == 0):
            await self.run(step, ask)

    async def run(self, step: int, ask: Services) -> Evaluation | None:
        """Evaluate now; None without held-out prompts. The same seeds every time, so differences are the policy's."""
        if not self.prompts:
            return None
        groups = await together([self._judged(prompt, ask) for prompt in self.prompts])
        right = [sum(s.reward > self.success for s in group) for group in groups]
        judged = [sum(not np.isnan(s.reward) for s in group) for group in groups]
        every = [s for group in groups for s in group]
        result = evaluation(
            right=right,
            judged=judged,
            k=self.k,
            rewards=[s.reward for s in every],
            lengths=[s.answer_tokens for s in every],
            truncated=sum(s.finish == "length" for s in every),
        )
        self.results[step] = result
        if self.tell is not None:
            self.tell(step, result)
        return result

    async def _judged(self, prompt: Prompt, ask: Services) -> tuple[Sample, ...]:
        digest = hashlib.blake2b(f"{self.seed}:{prompt.id}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest) >> 1
        for left in reversed(range(ATTEMPTS)):
            try:
                completions = await ask.policy.generate(prompt.tokens, self.samples, seed, self.sampling)
                return await ask.verify(prompt, [as_sample(prompt, c) for c in completions])
            except WorkerLost:
                if not left:
                    raise
        raise AssertionError("not reached")
