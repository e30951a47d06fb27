"""What every sampling engine must show, whatever is behind it: helpers for the tests of engines, workers and models.

`agreement` is the check of the sampler against the learner's arithmetic: the log-probs that came with the sampled
tokens are those of a plain forward pass over the same tokens, also after weights were exchanged several times.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.engines.weights import Publisher

VOCABULARY, CONTEXT = 128, 256


def random_llama(folder: Path | str, tied: bool, seed: int = 0) -> Any:
    """A random Llama (2 layers × 64, head size 32), saved in `folder`. Its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    return model


def shake(model: Any, seed: int, relative: float = 0.1) -> None:
    """Change every weight, by `relative` of its tensor's own spread."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=random)
            weight += noise * (relative * weight.std() if weight.std() > 0 else relative)


def forward_logp(model: Any, tokens: np.ndarray) -> np.ndarray:
    """log π(tokens[t] | <t) by one float32 forward pass; NaN at 0."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
    with torch.no_grad():
        every = model(ids).logits[0, :-1].float().log_softmax(-1)
    return np.concatenate([[np.nan], every.gather(1, ids[0, 1:, None])[:, 0].numpy()]).astype(np.float32)


def prompts(count: int, vocabulary: int = VOCABULARY, longest: int = 70, seed: int = 0) -> list[np.ndarray]:
    """Prompts of different lengths; with 70 tokens some fill several blocks of a prompt cache."""
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, random.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


@dataclass(frozen=True)
class Error:
    """|log-prob of the sampler − log-prob of the forward pass| over all sampled tokens."""

    mean: float
    max: float


def error_of(model: Any, asked: Sequence[np.ndarray], written: Sequence[Sequence[Completion]]) -> Error:
    """How far the log-probs of samples at temperature 1 are from those of `model`."""
    differences = []
    for prompt, completions in zip(asked, written, strict=True):
        for completion in completions:
            expected = forward_logp(model, np.concatenate([prompt, completion.tokens]))[len(prompt) :]
            differences.append(np.abs(completion.logp - expected))
    every = np.concatenate(differences)
    return Error(float(every.mean()), float(every.max()))


async def agreement(
    generate: Callable[..., Awaitable[list[Completion]]],
    deliver: Callable[[WeightRef], Awaitable[Any]],
    model: Any,
    publisher: Publisher,
    asked: Sequence[np.ndarray],
    updates: int = 5,
    samples: int = 4,
    max_tokens: int = 24,
    relative: float = 0.1,
) -> list[Error]:
    """Sample and compare, before and after each of `updates` exchanges of changed weights (versions 1, 2, …).

    `generate` and `deliver` are those of an engine or a pool that was started with `model`'s weights. Asserts that the
    samples carry the version they were written with. The errors are for the caller to judge.
    """
    errors = []
    for version in range(updates + 1):
        if version:
            shake(model, seed=version, relative=relative)
            await deliver(publisher.publish(version, model.named_parameters()))
        written = [await generate(p, samples, 17 * version + i, Sampling(max_tokens)) for i, p in enumerate(asked)]
        assert {c.versions for group in written for c in group} == {(version, version)}
        errors.append(error_of(model, asked, written))
    return errors
