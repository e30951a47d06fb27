"""The nouns. What one actor hands another.

Every array of a Sample has the sample's length N, and index t always speaks of token t:
`behavior_logp[t]` is log μ(tokens[t] | tokens[<t]). There is no prompt tensor and no response tensor, no left
padding and no shift: a mask is a test of `origin` against members of Origin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum

import numpy as np
from jaxtyping import Float32, Int32, UInt8


class Origin(IntFlag):
    """Who wrote a token. Masks are unions: Origin.POLICY | Origin.TEACHER."""

    PROMPT = 1  # given, never trained
    POLICY = 2  # sampled by the policy in training; behavior_logp is finite
    TEACHER = 4  # written by a teacher or demonstration; behavior_logp is NaN
    ENVIRONMENT = 8  # tool output, never trained


TRAINED = Origin.POLICY | Origin.TEACHER  # the tokens whose log-probabilities a learner computes


class Finish(StrEnum):
    """Why a sample ends."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class Signal(StrEnum):
    """What an algorithm needs of other models."""

    REFERENCE = "reference"  # the reference's log-prob of each token
    TEACHER = "teacher"  # every teacher's log-prob of each token
    TEACHER_TOPK = "teacher_topk"  # a teacher's k likeliest tokens at each place
    TEACHER_TEXT = "teacher_text"  # teachers that write: any vocabulary, local or behind an endpoint


@dataclass(frozen=True)
class Demonstration:
    """A worked answer by somebody else, kept with the prompt: in the policy's own tokens, its end token last."""

    teacher: str
    tokens: Int32[np.ndarray, "d"]
    quality: float = float("nan")  # what its source says of it; larger is better


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what its answer is checked against.

    `metadata` is the data row's own extra fields, for verifiers. `seed` belongs to one occurrence of the prompt in the
    run (epoch, position, attempt): the rollout derives each sample's sampling seed from it.
    """

    id: str
    tokens: Int32[np.ndarray, "p"]
    answer: str
    text: str = ""  # the question as the user wrote it, before the chat template; for people and verifiers
    messages: tuple[Mapping[str, str], ...] = ()  # the conversation, for teachers with a template of their own
    demonstrations: tuple[Demonstration, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    source: str = ""  # which dataset it came from
    seed: int = 0

    @property
    def conversation(self) -> tuple[Mapping[str, str], ...]:
        """`messages`, or the question as the only one of them."""
        return self.messages or ({"role": "user", "content": self.text},)


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens at each place, by somebody else."""

    ids: Int32[np.ndarray, "n k"]
    logp: Float32[np.ndarray, "n k"]


@dataclass(frozen=True)
class Sample:
    """One trajectory, as a flat run of N tokens."""

    tokens: Int32[np.ndarray, "n"]
    origin: UInt8[np.ndarray, "n"]
    behavior_logp: Float32[np.ndarray, "n"]  # log μ, NaN where μ did not sample the token
    versions: tuple[int, int]  # oldest and newest policy that wrote into it
    finish: Finish = Finish.STOP
    reward: float = float("nan")
    scores: Mapping[str, float] = field(default_factory=dict)  # the reward's parts
    advantage: Float32[np.ndarray, "n"] | None = None
    reference_logp: Float32[np.ndarray, "n"] | None = None
    teacher_logp: Float32[np.ndarray, "m n"] | None = None  # one row a teacher; NaN where it was not asked
    teacher_topk: TopK | None = None
    streams: Mapping[str, Float32[np.ndarray, "n"]] = field(default_factory=dict)  # what credit leaves for loss

    @property
    def guided(self) -> bool:
        """Whether a teacher wrote any of it."""
        return bool((self.origin == Origin.TEACHER).any())

    @property
    def answer_tokens(self) -> int:
        """How many tokens were written after the prompt, by whomever."""
        return int((self.origin != Origin.PROMPT).sum())


@dataclass(frozen=True)
class Answer:
    """What a verifier sees of a sample."""

    text: str  # decoded from the sample's tokens; the tokens stay what is trained on
    finish: Finish
    tokens: int  # how many


@dataclass(frozen=True)
class Group:
    """The samples of one prompt: the unit that is drawn, guided, credited, admitted, retried."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    replaced: tuple[Sample, ...] = ()  # the policy's answers that gave way to help: counted, never trained

    @property
    def own(self) -> tuple[Sample, ...]:
        """What the policy wrote without help, also where help took its place: what curves and pass rates are of."""
        return (*(s for s in self.samples if not s.guided), *self.replaced)

    @property
    def versions(self) -> tuple[int, int]:
        """Oldest and newest policy that wrote into any of the samples; ValueError without samples."""
        return min(s.versions[0] for s in self.samples), max(s.versions[1] for s in self.samples)

    @property
    def rewards(self) -> Float32[np.ndarray, "g"]:
        return np.array([s.reward for s in self.samples], np.float32)
