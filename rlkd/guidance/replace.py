"""Guidance on demand: rows of a group that failed give way to traces of teachers that the policy understands (AMPO)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rlkd.core.ports import Knobs, Services, as_demonstration
from rlkd.core.types import Demonstration, Group, Prompt, Sample
from rlkd.guidance.comprehension import Aggregate, Tags, least, ranked, spliced, to_bfloat16, understood

STREAM = 2  # of prompt.seed: which rows give way
KIND = "guidance"  # of what is reported


@dataclass(frozen=True)
class Trace:
    """A demonstration, and the row it would be in the group: verified."""

    demonstration: Demonstration
    row: Sample


@dataclass(frozen=True)
class Replacement:
    """At most `replace_at_most` wrong rows of a group become traces of its prompt, whole rows at a time.

    When: no row is right (adaptive); every group with a wrong row (always); or no row is right, and of the other groups
    a share (hybrid).
    Which traces: of the best `max_teachers` by quality, those that the verifier calls right, by κ = `comprehension`·s +
    `format`·[tags well formed], s of guidance/comprehension.py. Where no choice is to be made, κ is not computed.
    Which rows: drawn uniformly by `prompt.seed`.

    A trace that is wrong or could not be judged is not used, which is reported. The released code uses it, and gives
    every injected row the reward 1: `force_guide_reward`; `official_compat` does that too, always computes κ of two or
    more traces, and rounds s to bfloat16.
    """

    trigger: Literal["adaptive", "always", "hybrid"] = "adaptive"
    success: float = 0.6  # a reward above this is right; AMPO's are 0.9·right + 0.1·form
    hybrid_share: float = 0.3
    max_teachers: int = 4  # m
    replace_at_most: int = 2  # k
    comprehension: float = 0.9
    format: float = 0.1
    aggregate: Aggregate = "mean_prob"
    open_tag: str = "<answer>"
    close_tag: str = "</answer>"  # empty: the answer ends the text
    gap: str = " "  # between tag and reference answer, where the trace has no white space there
    force_guide_reward: bool = False
    official_compat: bool = False

    def problems(self) -> list[str]:
        found = []
        for name in ("max_teachers", "replace_at_most"):
            if getattr(self, name) < 1:
                found.append(f"guidance.{name}={getattr(self, name)} must be at least 1")
        for name in ("comprehension", "format"):
            if getattr(self, name) < 0:
                found.append(f"guidance.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.hybrid_share <= 1:
            found.append(f"guidance.hybrid_share={self.hybrid_share} must be between 0 and 1")
        if not self.open_tag:
            found.append("guidance.open_tag is empty: nothing would say where an answer begins")
        return found

    @property
    def forced(self) -> bool:
        return self.force_guide_reward or self.official_compat

    async def __call__(self, group: Group, ask: Services, knobs: Knobs) -> Group:
        wrong = [i for i, s in enumerate(group.samples) if not s.reward > self.success]
        rng = np.random.default_rng([group.prompt.seed, STREAM])
        if not wrong or not self._asked_for(len(wrong) == len(group.samples), rng):
            return group
        traces = await self._usable(group, ask)
        if not traces:
            return group
        room = min(self.replace_at_most, len(wrong))
        if len(traces) > (1 if self.official_compat else room):
            traces = await self._by_comprehension(group.prompt, traces, ask)
        chosen = traces[:room]
        places = sorted(rng.choice(wrong, len(chosen), replace=False).tolist())
        rows = {place: trace.row for place, trace in zip(places, chosen, strict=True)}
        samples = tuple(rows.get(i, s) for i, s in enumerate(group.samples))
        return replace(group, samples=samples, replaced=tuple(group.samples[i] for i in places))

    def _asked_for(self, all_wrong: bool, rng: np.random.Generator) -> bool:
        if all_wrong or self.trigger == "always":
            return True
        return self.trigger == "hybrid" and bool(rng.random() < self.hybrid_share)

    async def _usable(self, group: Group, ask: Services) -> list[Trace]:
        """The prompt's traces with their rewards, best quality first: the right ones, or all with reward 1."""
        prompt = group.prompt
        known = await ask.demonstrations(prompt)
        pool = sorted(known, key=_quality)[: self.max_teachers]
        if not pool:
            ask.report(KIND, f"prompt {prompt.id}: no row is right enough, and there is no trace for it")
            return []
        rows = await ask.verify(prompt, [as_demonstration(prompt, d, group.versions) for d in pool])
        judged = [Trace(d, r) for d, r in zip(pool, rows, strict=True)]
        if self.forced:
            return [replace(t, row=replace(t.row, reward=float(np.fmax(t.row.reward, 1.0)))) for t in judged]
        right = [t for t in judged if t.row.reward > self.success]
        if len(right) < len(judged):
            text = f"{len(judged) - len(right)} of {len(judged)} traces are wrong or could not be judged: not used"
            ask.report(KIND, f"prompt {prompt.id}: {text}")
        return right

    async def _by_comprehension(self, prompt: Prompt, traces: Sequence[Trace], ask: Services) -> list[Trace]:
        """The traces from the best κ to the worst. The policy is asked once, for all of them."""
        if ask.tokenizer is None:
            raise ValueError("to splice reference answers into traces, guidance needs the policy's tokenizer")
        tags = Tags(self.open_tag, self.close_tag, self.gap)
        texts = [ask.tokenizer.decode(t.demonstration.tokens) for t in traces]
        made = [spliced(prompt.tokens, text, prompt.answer, tags, ask.tokenizer) for text in texts]
        longest = math.inf if ask.sampling is None else len(prompt.tokens) + ask.sampling.max_tokens
        # A sequence of exactly the model's context cannot be scored by vLLM, which always writes a token.
        fits = [s is not None and len(s.tokens) < longest for s in made]
        read = [s for s, fit in zip(made, fits, strict=True) if fit and s is not None]
        if len(read) < len(made):
            text = f"{len(made) - len(read)} of {len(made)} traces have no single `{self.open_tag}` with room behind it"
            ask.report(KIND, f"prompt {prompt.id}: {text}: comprehension 0")
        logps = iter(await ask.policy.logp([s.tokens for s in read]) if read else [])
        found = [self._understood(next(logps)[s.omega]) if fit and s is not None else least(self.aggregate)
                 for s, fit in zip(made, fits, strict=True)]  # fmt: skip
        keys = [self.comprehension * s + self.format * tags.well_formed(t) for s, t in zip(found, texts, strict=True)]
        return [traces[i] for i in ranked(keys)]

    def _understood(self, logp: np.ndarray) -> float:
        value = understood(logp.astype(np.float32), self.aggregate)
        return to_bfloat16(value) if self.official_compat else value


def _quality(demonstration: Demonstration) -> float:
    """Larger quality first; what its source does not say comes last."""
    return math.inf if math.isnan(demonstration.quality) else -demonstration.quality
