"""The data section of a recipe: the prompts to train on, and those held out."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from rlkd.core.errors import ConfigError
from rlkd.data.chat import HFTokenizer
from rlkd.data.dataset import Dataset, Rules, TooLongRule, load
from rlkd.data.sources import SourceSettings


@runtime_checkable
class DataSettings(Protocol):
    """See `rlkd.config.schema.DataConfig`."""

    @property
    def train(self) -> SourceSettings: ...
    @property
    def holdout(self) -> SourceSettings | None: ...
    @property
    def max_prompt_tokens(self) -> int | None: ...
    @property
    def too_long(self) -> TooLongRule: ...
    @property
    def bad_rows(self) -> Literal["fail", "drop"]: ...
    @property
    def max_bad_fraction(self) -> float: ...
    @property
    def chat(self) -> bool: ...


@dataclass(frozen=True)
class Data:
    train: Dataset
    holdout: Dataset | None
    warnings: tuple[str, ...]


def load_data(
    config: DataSettings, tokenizer: HFTokenizer, context: int, answer_tokens: int, system: str | None = None
) -> Data:
    """Both sources. A prompt and an answer of `answer_tokens` share the model's `context`, in tokens.

    Raises ConfigError if they cannot, and what `dataset.load` raises.
    """
    rules = Rules(
        _room(config.max_prompt_tokens, context, answer_tokens), config.too_long, config.bad_rows,
        config.max_bad_fraction, config.chat, system, answer_tokens,
    )  # fmt: skip
    train = load(config.train, tokenizer, rules, "data.train")
    holdout = None if config.holdout is None else load(config.holdout, tokenizer, rules, "data.holdout")
    warnings = train.warnings
    if holdout is not None:
        warnings = (*warnings, *holdout.warnings, *_overlap(train, holdout))
    return Data(train, holdout, warnings)


def _room(max_prompt_tokens: int | None, context: int, answer_tokens: int) -> int:
    """How many tokens a prompt may have."""
    room = context - answer_tokens
    if room < 1:
        raise ConfigError(
            "RLKD-C405",
            f"answers of {answer_tokens:,} tokens leave no room for a prompt in a context of {context:,}",
            where="sampler.max_tokens",
            fix="shorten sampler.max_tokens, or raise model.context if the model allows it",
        )
    if max_prompt_tokens is None:
        return room
    if max_prompt_tokens < 1:
        raise ConfigError("RLKD-C406", f"must be at least 1, not {max_prompt_tokens}", "data.max_prompt_tokens")
    if max_prompt_tokens > room:
        raise ConfigError(
            "RLKD-C407",
            f"prompts of {max_prompt_tokens:,} and answers of {answer_tokens:,} tokens do not fit in {context:,}",
            where="data.max_prompt_tokens",
            fix=f"at most {room:,}; or shorten sampler.max_tokens",
        )
    return max_prompt_tokens


def _overlap(train: Dataset, holdout: Dataset) -> list[str]:
    """A warning if prompts to be trained on are held out too: evaluation would be too good."""
    trained = {prompt.tokens.tobytes(): prompt.id for prompt in train.prompts}
    both = [(p.id, trained[key]) for p in holdout.prompts if (key := p.tokens.tobytes()) in trained]
    if not both:
        return []
    return [
        f"data.holdout: {len(both):,} of {len(holdout.prompts):,} held-out prompts are trained on too, "
        f"as {both[0][0]} (training: {both[0][1]})"
    ]
