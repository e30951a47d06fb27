"""Small random models and groups for the tests of learner and scorer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlkd.core.types import Group, Origin, Prompt, Sample

torch.set_num_threads(1)  # tensors this small: a second thread costs more than it gives, far more on busy cores

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough for attention to matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied-mha": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tiny_model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of a real architecture, float32, eager attention."""
    torch.manual_seed(seed)
    options = {**SIZES, **KINDS[kind], **changes}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()


def tiny_folder(directory: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """The same as a folder."""
    folder = directory / f"{kind}-{seed}"
    tiny_model(kind, seed, **changes).save_pretrained(folder)
    return folder


def random_sample(prompt: np.ndarray, length: int, draw: np.random.Generator, mixed: bool = False) -> Sample:
    """`length` answer tokens; with `mixed` some are a teacher's or the environment's."""
    choices = [Origin.POLICY, Origin.TEACHER, Origin.ENVIRONMENT] if mixed else [Origin.POLICY]
    origin = np.concatenate([np.full(len(prompt), Origin.PROMPT), draw.choice(choices, length)]).astype(np.uint8)
    tokens = np.concatenate([prompt, draw.integers(3, VOCABULARY, length)]).astype(np.int32)
    behavior = np.where(origin == Origin.POLICY, -draw.random(len(tokens)) * 4, np.nan).astype(np.float32)
    advantage = np.full(len(tokens), draw.normal(), np.float32)
    return Sample(tokens, origin, behavior, (0, 0), reward=float(advantage[0]), advantage=advantage)


def random_groups(
    seed: int, groups: int = 2, samples: int = 3, prompt: int = 5, answer: int = 9, mixed: bool = False,
    shortest: int = 1,
) -> list[Group]:  # fmt: skip
    """Prompts of `shortest` … `prompt` tokens, answers of 1 … `answer`; a sample has at least two tokens."""
    draw = np.random.default_rng(seed)
    found = []
    for g in range(groups):
        tokens = draw.integers(3, VOCABULARY, int(draw.integers(shortest, prompt + 1))).astype(np.int32)
        least = 2 if len(tokens) == 0 else 1
        members = [random_sample(tokens, int(draw.integers(least, answer + 1)), draw, mixed) for _ in range(samples)]
        found.append(Group(Prompt(f"p{seed}-{g}", tokens, ""), tuple(members)))
    return found
