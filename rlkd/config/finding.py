"""What is found wrong in a Config, and what it is found with."""

from dataclasses import dataclass

from rlkd.config.schema import Config


@dataclass(frozen=True)
class Finding:
    """One problem. `keys` are all that take part in it, the one to point at first."""

    keys: tuple[str, ...]
    what: str
    fix: str
    code: str = "RLKD-C011"


@dataclass(frozen=True)
class Given:
    """A Config, and what may be known beside it."""

    config: Config
    context: int | None  # tokens of prompt + answer
    longest_prompt: int | None  # tokens: of the data, or what the recipe allows
