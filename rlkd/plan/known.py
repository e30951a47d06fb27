"""Sizes of published models, so that a recipe can be planned before its model is there.

The facts of their config.json files; a folder's own config.json comes first.
"""

from collections.abc import Mapping
from typing import Any


def _sizes(kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, context: int,
           tied: bool = False, head_dim: int | None = None) -> Mapping[str, Any]:  # fmt: skip
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        **({} if head_dim is None else {"head_dim": head_dim}),
    }


KNOWN: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": _sizes("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "smollm2": _sizes("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),  # as `rlkd model get` calls it
    "Qwen2.5-0.5B": _sizes("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tied=True),
    "Qwen2.5-1.5B": _sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, tied=True),
    "Qwen2.5-3B": _sizes("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, tied=True),
    "Qwen2.5-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "Qwen2.5-14B": _sizes("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072),
    "Qwen2.5-32B": _sizes("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072),
    "Qwen2.5-72B": _sizes("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072),
    "Qwen2.5-Math-1.5B": _sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, 4096, tied=True),
    "Qwen2.5-Math-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064, 4096),
    "Qwen2.5-Math-7B-16k": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064, 16384),
    "R1-Distill-Qwen-1.5B": _sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072),
    "R1-Distill-Qwen-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "OR1-Math-7B": _sizes("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "Qwen3-0.6B": _sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, tied=True, head_dim=128),
    "Qwen3-1.7B": _sizes("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, tied=True, head_dim=128),
    "Qwen3-4B": _sizes("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, tied=True, head_dim=128),
    "Qwen3-8B": _sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128),
    "Qwen3-14B": _sizes("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, head_dim=128),
    "Qwen3-32B": _sizes("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, head_dim=128),
    "Llama-3.2-1B": _sizes("llama", 2048, 8192, 16, 32, 8, 128256, 131072, tied=True, head_dim=64),
    "Llama-3.2-3B": _sizes("llama", 3072, 8192, 28, 24, 8, 128256, 131072, tied=True, head_dim=128),
    "Llama-3.1-8B": _sizes("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "Llama-3.1-70B": _sizes("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "deepseek-math-7b": _sizes("llama", 4096, 11008, 30, 32, 32, 102400, 4096),
}
