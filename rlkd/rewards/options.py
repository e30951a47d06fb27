"""Checks of the rewards' own options, when a reward is made: before anything starts."""

import re

from rlkd.core.errors import ConfigError

MISSING = "???"  # OmegaConf's mark for "must be given"


def wrong(reward: object, option: str, why: str, fix: str) -> ConfigError:
    """The error for one option of one reward; the value is named."""
    value = getattr(reward, option)
    name = type(reward).__name__
    return ConfigError("RLKD-C304", f"`{option}` of the reward {name} is {value!r}: {why}", fix=fix)


def check_regex(reward: object, option: str) -> None:
    """ConfigError unless the option is a regular expression of Python."""
    try:
        re.compile(getattr(reward, option))
    except re.error as e:
        raise wrong(reward, option, f"not a regular expression ({e})", "see the `re` module's syntax") from None
