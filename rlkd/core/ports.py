"""What the loop asks of the world. Everything behind these may be Ray, vLLM, DeepSpeed, or a fake in a test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from rlkd.core.batch import MicroBatch
from rlkd.core.types import Answer, Demonstration, Finish, Group, Origin, Prompt, Sample, Signal, TopK

Knobs = Mapping[str, float]  # what changes from step to step: coefficients, fractions, temperatures


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the step's loss. Shares of all micro-batches and ranks sum to the step's value."""

    value: Tensor
    metrics: Mapping[str, Tensor]  # shares too
    maxima: Mapping[str, Tensor] = field(default_factory=dict)  # of which the step keeps the largest


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy in training says about a micro-batch. NaN at tokens nobody trains on (prompt, environment)."""

    logp: Float[Tensor, "t"]  # log π_θ(tokens[t] | <t), with gradient
    entropy: Float[Tensor, "t"]  # of the distribution tokens[t] was drawn from, in nats
    at: Callable[[Int[Tensor, "t k"]], Float[Tensor, "t k"]]  # log π_θ of other tokens at the same places


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt: its tokens (with the end token, if it got there) and their log-probs."""

    tokens: Int32[np.ndarray, "c"]
    logp: Float32[np.ndarray, "c"]  # of the distribution it was sampled from (after temperature)
    finish: Finish
    versions: tuple[int, int]


def as_demonstration(prompt: Prompt, demonstration: Demonstration, versions: tuple[int, int]) -> Sample:
    """Prompt and a whole worked answer of a teacher; `versions` are those of the group it joins."""
    p, d = len(prompt.tokens), len(demonstration.tokens)
    return Sample(
        tokens=np.concatenate([prompt.tokens, demonstration.tokens]).astype(np.int32),
        origin=np.repeat(np.array([Origin.PROMPT, Origin.TEACHER], np.uint8), [p, d]),
        behavior_logp=np.full(p + d, np.nan, np.float32),
        versions=versions,
    )


def as_sample(prompt: Prompt, completion: Completion) -> Sample:
    """Prompt and completion as one flat run; the prompt's tokens have no behavior_logp."""
    p, c = len(prompt.tokens), len(completion.tokens)
    return Sample(
        tokens=np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32),
        origin=np.repeat(np.array([Origin.PROMPT, Origin.POLICY], np.uint8), [p, c]),
        behavior_logp=np.concatenate([np.full(p, np.nan, np.float32), completion.logp]).astype(np.float32),
        versions=completion.versions,
        finish=completion.finish,
    )


@dataclass(frozen=True)
class Sampling:
    """How a model writes. `max_tokens` counts the completion; `stop_tokens` end it and are kept in it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True)
class WeightRef:
    """One version of the policy's weights, and where a rollout worker finds them."""

    version: int
    where: str  # a directory or file that both sides can read
    digest: str  # of the bytes: what a worker reports back after loading
    node: str = ""  # Ray's id of the node whose file it is; "": everybody can read it


@runtime_checkable
class Model(Protocol):
    """A language model that can be sampled and that can score: the policy, a teacher, the reference."""

    async def generate(
        self, tokens: Int32[np.ndarray, "p"], n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]: ...
    async def logp(self, sequences: Sequence[Int32[np.ndarray, "_"]]) -> list[Float32[np.ndarray, "_"]]: ...
    async def topk(self, sequences: Sequence[Int32[np.ndarray, "_"]], k: int) -> list[TopK]: ...


@dataclass(frozen=True)
class Written:
    """A text somebody wrote, and whether it came to its end."""

    text: str
    finish: Finish
    tokens: int | None  # in the writer's own vocabulary; None: it did not say


@runtime_checkable
class Writer(Protocol):
    """A teacher that writes text: a local model with its own chat template, or an endpoint. Any vocabulary."""

    async def write(self, messages: Sequence[Mapping[str, str]], seed: int = 0) -> Written: ...


@runtime_checkable
class Verify(Protocol):
    """Scores a group's samples: fills `scores` and `reward`; a sample that could not be judged keeps reward NaN."""

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> tuple[Sample, ...]: ...


@runtime_checkable
class Tokenizer(Protocol):
    eos: int

    def encode(self, text: str) -> Int32[np.ndarray, "_"]: ...
    def decode(self, tokens: Int32[np.ndarray, "_"]) -> str: ...
    def chat(self, messages: Sequence[Mapping[str, str]]) -> Int32[np.ndarray, "_"]: ...  # ends where the answer begins
    def spans(
        self, text: str
    ) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n 2"]]: ...  # ids; characters of each


@runtime_checkable
class Traces(Protocol):
    """Worked answers to a prompt: those stored with it, and those that live teachers write."""

    async def __call__(self, prompt: Prompt) -> tuple[Demonstration, ...]: ...


def _unheard(kind: str, text: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Services:
    """What rollout and guidance may ask for."""

    policy: Model
    verify: Verify
    teachers: Mapping[str, Model] = field(default_factory=dict)  # that score, by name
    reference: Model | None = None
    tokenizer: Tokenizer | None = None
    writers: Mapping[str, Writer] = field(default_factory=dict)  # teachers that write, by name
    traces: Traces | None = None
    report: Callable[[str, str], None] = _unheard  # what guidance met, counted by kind and shown
    sampling: Sampling | None = None  # how the policy writes while it is trained

    async def demonstrations(self, prompt: Prompt) -> tuple[Demonstration, ...]:
        """Worked answers to a prompt: of `traces` where the run has them, else those stored with the prompt."""
        return prompt.demonstrations if self.traces is None else await self.traces(prompt)


@runtime_checkable
class Rollout(Protocol):
    """From a prompt to a group of samples, in as many phases as it takes."""

    async def __call__(self, prompt: Prompt, ask: Services, knobs: Knobs) -> Group: ...


@runtime_checkable
class Guidance(Protocol):
    """From a group with rewards to a group with help in it, and rewards for the help."""

    async def __call__(self, group: Group, ask: Services, knobs: Knobs) -> Group: ...


@runtime_checkable
class Algorithm(Protocol):
    """Pure functions, two ways to ask the world, and what it needs. The instance is its configuration.

    `wants`: which samples of a group, whose rewards are known, the model of that name ("reference", or a teacher's)
    must score. The others keep NaN and nobody pays for them: a loss that gives a sample no weight says so there.
    """

    @property
    def rollout(self) -> Rollout: ...
    @property
    def guidance(self) -> Guidance: ...
    @property
    def needs(self) -> frozenset[Signal]: ...
    @property
    def whole_groups(self) -> bool: ...  # the loss compares samples of a group: keep them in one micro-batch

    @property
    def top_k(self) -> int: ...  # of Signal.TEACHER_TOPK

    def knobs(self, step: int, last: Knobs) -> Knobs: ...  # last: the step before's knobs and metrics
    def wants(self, group: Group, model: str) -> Bool[np.ndarray, "g"]: ...  # on the driver, before credit
    def credit(self, group: Group) -> Group: ...  # on the driver; a group left without samples is turned away
    def credit_step(self, groups: Sequence[Group]) -> Sequence[Group]: ...  # what needs all groups of a step at once
    def loss(self, pi: PolicyOutput, x: MicroBatch, knobs: Knobs) -> Loss: ...  # in the learner


@runtime_checkable
class Curriculum(Protocol):
    """Which prompt comes next."""

    def draw(self) -> Prompt: ...
    def observe(self, group: Group) -> None: ...  # learn from a group; called in the order of drawing, once a step
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Learner(Protocol):
    """The group of learner ranks, as the driver sees it."""

    @property
    def ranks(self) -> int: ...

    async def update(self, batch: list[list[MicroBatch]], knobs: Knobs) -> Mapping[str, float]: ...
    async def publish(self, version: int) -> None: ...  # returns when every sampler has these weights
    async def save(self, path: str) -> Mapping[str, str]: ...  # a digest of each part of its state; SaveFailed
    async def load(self, path: str) -> Mapping[str, str]: ...  # the same, of what it has now
    async def rebuild(self) -> None: ...  # after LearnerLost: new ranks, as at the start
    async def export(self, path: str) -> None: ...  # a Hugging Face folder, and probe.json beside it


@runtime_checkable
class Reward(Protocol):
    """One part of the reward, for all answers of a group at once. Pure; may hang; runs in a child process."""

    @property
    def weight(self) -> float: ...

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> Sequence[float | None]: ...  # None: could not judge
