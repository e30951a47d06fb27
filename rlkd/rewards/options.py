"""Checks of the rewards' own options, when a reward is made: before anything starts."""

import re

from rlkd.core.errors import ConfigError
from rlkd.rewards.backtracking import SECONDS, endless

MISSING = "???"  # OmegaConf's mark for "must be given"


def wrong(reward: object, option: str, why: str, fix: str) -> ConfigError:
    """The error for one option of one reward; the value is named."""
    value = getattr(reward, option)
    name = type(reward).__name__
    return ConfigError("RLKD-C304", f"`{option}` of the reward {name} is {value!r}: {why}", fix=fix)


def check_regex(reward: object, option: str) -> None:
    """ConfigError unless the option is a regular expression of Python, and one that comes to an end."""
    try:
        pattern = getattr(reward, option)
        re.compile(pattern)
        text = endless(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise wrong(reward, option, f"not a regular expression ({e})", "see the `re` module's syntax") from None
    if text is not None:
        why = f"it takes more than {SECONDS} s on a text such as {text!r}, which it can match in too many ways"
        fix = "no repetition inside another that can match the same: `(a+)+` is `a+`; or bound it, `{1,20}`"
        raise wrong(reward, option, why, fix)
