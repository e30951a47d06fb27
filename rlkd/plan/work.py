"""What one optimizer step asks for, in tokens."""

import math
from dataclasses import dataclass

from rlkd.config.schema import Config
from rlkd.core.types import Signal
from rlkd.plan.shape import Shape
from rlkd.rollout.traced import Traced

SCORED = frozenset({Signal.TEACHER, Signal.TEACHER_TOPK})
PROMPT = 256  # tokens of the longest prompt, where neither recipe nor data say


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: means, which time follows, and the longest, which memory must hold."""

    prompt: float
    answer: float
    longest_prompt: int
    longest_answer: int
    said: str  # where they come from, for the user

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_answer


def assumed(config: Config, shape: Shape, prompt: float | None = None, answer: float | None = None) -> Lengths:
    """From the recipe alone; `prompt` and `answer` are means that somebody knows better."""
    most = config.sampler.max_tokens
    context = config.model.context or shape.context
    longest = config.data.max_prompt_tokens or max(1, min(PROMPT, context - most))
    parts = [f"prompts of {prompt:.0f} tokens" if prompt is not None else f"prompts of {longest / 2:.0f} (assumed)"]
    parts += [f"answers of {answer:.0f}" if answer is not None else f"answers of {most / 2:.0f} (assumed)"]
    return Lengths(
        longest / 2 if prompt is None else prompt,
        most / 2 if answer is None else min(answer, float(most)),
        longest if prompt is None else max(longest, math.ceil(prompt)),
        most,
        ", ".join(parts),
    )


@dataclass(frozen=True)
class Work:
    """Of one optimizer step, all workers together."""

    groups: int
    samples: int  # of a group
    lengths: Lengths
    share_prompt: bool  # the learner and the scorers compute a group's prompt once
    prefix_caching: bool  # the sampler does
    scored: tuple[str, ...]  # frozen models that score every sample
    sampled: bool = True  # False: the policy writes nothing, answers are of others (SFT)

    @property
    def sequences(self) -> int:
        return self.groups * self.samples

    @property
    def written(self) -> float:
        """Tokens of answers: what is sampled, and trained."""
        return self.sequences * self.lengths.answer

    @property
    def computed(self) -> float:
        """Tokens of the learner's forward pass."""
        return self._computed(self.lengths.prompt, self.lengths.answer)

    @property
    def most_computed(self) -> float:
        """The same, were every prompt and answer as long as it may be."""
        return self._computed(float(self.lengths.longest_prompt), float(self.lengths.longest_answer))

    @property
    def prefilled(self) -> float:
        """Prompt tokens that the sampler computes."""
        times = 1 if self.prefix_caching else self.samples
        return self.groups * times * self.lengths.prompt

    @property
    def context(self) -> float:
        """Tokens that a token attends to, on average over an answer."""
        return self.lengths.prompt + self.lengths.answer / 2

    def _computed(self, prompt: float, answer: float) -> float:
        prompts = self.groups if self.share_prompt else self.sequences
        return prompts * prompt + self.sequences * answer


def work_of(config: Config, lengths: Lengths) -> Work:
    """What a step of this recipe asks. Groups that are turned away (no signal) are sampled beside, and not counted:
    nobody knows their share beforehand."""
    return Work(
        config.schedule.groups_per_step,
        int(getattr(config.algorithm.rollout, "samples", 1)),
        lengths,
        config.learner.share_prompt,
        config.sampler.prefix_caching,
        tuple(scorers(config)),
        not isinstance(config.algorithm.rollout, Traced),
    )


def scorers(config: Config) -> dict[str, int]:
    """Frozen models that give log-probs, as the algorithm asks, and how many workers each has. As rlkd/teachers.py."""
    found: dict[str, int] = {}
    if Signal.REFERENCE in config.algorithm.needs:
        found["reference"] = config.reference.workers
    if config.algorithm.needs & SCORED:
        found |= {name: t.workers for name, t in config.teachers.items()}
    return found


def writers(config: Config) -> dict[str, int]:
    """Local teachers that write text, and how many workers each has."""
    if Signal.TEACHER_TEXT not in config.algorithm.needs:
        return {}
    return {name: t.workers for name, t in config.teachers.items() if t.endpoint is None}
