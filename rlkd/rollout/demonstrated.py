"""Answers of the policy beside worked answers by somebody else, whole or begun (LUFFY)."""

from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int32

from rlkd.core.ports import Completion, Knobs, Sampling, Services, as_demonstration, as_sample
from rlkd.core.together import together
from rlkd.core.types import Demonstration, Group, Origin, Prompt, Sample
from rlkd.rollout.sampled import Sampled

STREAM = 1  # of prompt.seed: which demonstrations, and how much of each


@dataclass(frozen=True)
class Demonstrated(Sampled):
    """G samples: k from demonstrations, the others from the policy. A prompt without a demonstration gives G of the
    policy's; one with fewer than k uses those it has.

    Of each demonstration the first ⌊u·length⌋ tokens are taken, u uniform in [prefix_min, prefix_max], and the policy
    continues after them within what is left of sampler.max_tokens. u = 1 is the whole worked answer, nothing is
    written. Which demonstrations and which u depend on `prompt.seed` alone.
    """

    demonstrations: int = 1  # k
    prefix_min: float = 1.0
    prefix_max: float = 1.0

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.demonstrations < self.samples:
            found.append(f"demonstrations={self.demonstrations} must be at least 0 and below samples={self.samples}")
        if not 0 <= self.prefix_min <= self.prefix_max <= 1:
            found.append(f"prefix_min={self.prefix_min} and prefix_max={self.prefix_max}: 0 ≤ min ≤ max ≤ 1")
        return found

    async def __call__(self, prompt: Prompt, ask: Services, knobs: Knobs) -> Group:
        known = await ask.demonstrations(prompt)
        rng = np.random.default_rng([prompt.seed, STREAM])
        chosen = rng.choice(len(known), min(self.demonstrations, len(known)), replace=False)
        ratios = rng.uniform(self.prefix_min, self.prefix_max, len(chosen))
        seeds = rng.integers(2**63, size=len(chosen)).tolist()
        taken = [(known[i], prefix_length(known[i], u)) for i, u in zip(chosen, ratios, strict=True)]
        begun = [
            continued(prompt, d.tokens[:n], seed, ask)
            for (d, n), seed in zip(taken, seeds, strict=True)
            if n < len(d.tokens)
        ]
        own = ask.policy.generate(prompt.tokens, self.samples - len(taken), prompt.seed)
        work: list[Coroutine[Any, Any, Any]] = [own, *begun]
        written, *rest = await together(work)
        samples = [as_sample(prompt, c) for c in written]
        versions = Group(prompt, tuple(samples)).versions
        whole = [as_demonstration(prompt, d, versions) for d, n in taken if n == len(d.tokens)]
        return Group(prompt, (*samples, *rest, *whole))


def prefix_length(demonstration: Demonstration, ratio: float) -> int:
    """⌊u·length⌋ tokens."""
    return int(len(demonstration.tokens) * ratio)


async def continued(prompt: Prompt, prefix: Int32[np.ndarray, "_"], seed: int, ask: Services) -> Sample:
    """The policy's own end of an answer that a teacher began; nothing of the prefix is the policy's.

    ValueError if `ask.sampling` is not known: the answer as a whole must stay within its max_tokens.
    """
    if ask.sampling is None:
        raise ValueError("to continue a demonstration, Services.sampling must say how long an answer may be")
    start = np.concatenate([prompt.tokens, prefix]).astype(np.int32)
    completions = await ask.policy.generate(start, 1, seed, remaining(ask.sampling, len(prefix)))
    return after_prefix(prompt, prefix, completions[0])


def remaining(sampling: Sampling, written: int) -> Sampling:
    """What is left of an answer of which `written` tokens are there."""
    return replace(
        sampling,
        max_tokens=sampling.max_tokens - written,
        min_tokens=max(0, sampling.min_tokens - written),
    )


def after_prefix(prompt: Prompt, prefix: Int32[np.ndarray, "_"], completion: Completion) -> Sample:
    """Prompt, the teacher's tokens, the policy's: one flat run. `behavior_logp` is that of the policy's tokens."""
    p, d, c = len(prompt.tokens), len(prefix), len(completion.tokens)
    unknown = np.full(p + d, np.nan, np.float32)
    return Sample(
        tokens=np.concatenate([prompt.tokens, prefix, completion.tokens]).astype(np.int32),
        origin=np.repeat(np.array([Origin.PROMPT, Origin.TEACHER, Origin.POLICY], np.uint8), [p, d, c]),
        behavior_logp=np.concatenate([unknown, completion.logp]).astype(np.float32),
        versions=completion.versions,
        finish=completion.finish,
    )
