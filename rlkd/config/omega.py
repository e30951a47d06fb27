"""What OmegaConf leaves to us: nodes of frozen dataclasses that can be written to, and words for its errors."""

import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationValidationError

from rlkd.config.kinds import in_words
from rlkd.config.places import did_you_mean, similar


def structured(cls: type[Any]) -> DictConfig:
    """A node of the dataclass that can be written to: OmegaConf makes those of frozen dataclasses read-only."""
    node = OmegaConf.structured(cls)
    _unlock(node)
    assert isinstance(node, DictConfig)
    return node


def _unlock(node: Any) -> None:
    OmegaConf.set_readonly(node, False)
    if isinstance(node, DictConfig):
        for key in node:
            if not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node[key]):
                _unlock(node[key])


def why_unresolved(
    error: BaseException, path: str, written: str, hint: Any, known: Sequence[str]
) -> tuple[str, str | None]:
    """What is wrong with the interpolation `written` under the key `path`, and what to do.

    The words show the expression and never its value, which may be a secret. `hint` is the setting's type,
    `known` all dotted keys of the recipe.
    """
    message = str(error)
    variable = re.search(r"Environment variable '([^']*)' not found", message)
    if variable:
        name = variable.group(1)
        return (
            f"`{path}` needs the environment variable {name}, which is not set",
            f"export {name}=…, or give a default: ${{oc.env:{name},value}}",
        )
    if isinstance(error, InterpolationKeyError):
        wanted = re.search(r"Interpolation key '([^']*)'", message)
        meant = did_you_mean(similar(wanted.group(1), known)) if wanted else ""
        return f"`{path}`: `{written}` names no key of the recipe", meant or "write ${section.key}"
    if isinstance(error, InterpolationValidationError):
        return f"`{path}` must be {in_words(hint)}; what `{written}` stands for is not", None
    reason = "it comes back to itself" if "ecursive" in message else "it has no value"
    return f"`{path}`: `{written}` cannot be resolved: {reason}", "write ${oc.env:NAME} or ${section.key}"
