"""The shapes of every family against what transformers makes of the same config.json."""

import json

import pytest
import torch

from rlkd.plan.shape import FAMILIES, read

pytestmark = [pytest.mark.stack, pytest.mark.long]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_has_as_many_as_transformers_makes(kind: str, bias: bool, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    content = {**SMALL, "tie_word_embeddings": tied, **({"attention_bias": bias} if kind in ("llama", "qwen3") else {})}
    config = AutoConfig.for_model(kind, **content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = read(json.loads(config.to_json_string(use_diff=False)), "small", "here")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.tied is tied
    head = model.get_output_embeddings().weight
    assert found.head == head.numel()
    assert found.trunk == found.parameters - head.numel() * (1 if tied else 2)
