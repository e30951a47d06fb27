"""A small tokenizer for tests: one token a byte, so that every text has tokens and length counts bytes."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlkd.data import HFTokenizer

PAD, BOS, EOS, TURN = "<pad>", "<s>", "</s>", "<turn>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, eos: str | None = EOS) -> PreTrainedTokenizerFast:
    special = [PAD, BOS, EOS, TURN]
    words = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=eos,
        additional_special_tokens=[TURN],
        chat_template=template,
    )


def folder(path: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A model folder as far as its tokenizer is concerned."""
    (tokenizer or byte_tokenizer()).save_pretrained(path)
    return path


def wrapped(template: str | None = TEMPLATE) -> HFTokenizer:
    return HFTokenizer(byte_tokenizer(template))
