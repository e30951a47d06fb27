"""How large the models and batches of the measurement are."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    model: dict[str, Any]  # of a Qwen2, as transformers' config calls it
    rows: int  # of hidden states at the head
    width: int  # of these
    vocabulary: int
    groups: int
    samples: int  # of a group
    prompt: int  # tokens
    answers: tuple[int, int]  # shortest and longest, tokens

    @property
    def longest(self) -> int:
        return self.prompt + self.answers[1]


# Qwen2.5-0.5B's; the head of a 7B model
LARGE = Shape(
    {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
     "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 8192},
    rows=8192, width=3584, vocabulary=152_064, groups=2, samples=8, prompt=512, answers=(64, 2048),
)  # fmt: skip
SMALL = Shape(
    {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    rows=64, width=32, vocabulary=512, groups=2, samples=3, prompt=12, answers=(3, 20),
)  # fmt: skip
