"""From a recipe to a Config. Every problem is found and reported at once, each with its place and what to do.

`load` = read yaml, defaults and overrides (recipe.py) → fit them into the dataclasses (fit.py; OmegaConf checks the
types and resolves interpolations such as `${oc.env:NAME}` and `${sampler.max_tokens}`) → frozen dataclasses →
check what contradicts what (contradictions.py).

    RLKD-C001 recipe cannot be read · C002 unknown key · C003 wrong type · C004 missing · C005 not yaml · C006 key twice
    C007 defaults · C008 command line · C009 interpolation · C010 algorithm · C011 contradiction · C012 out of range
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from os import PathLike
from typing import Any

import yaml

from rlkd.config import contradictions, recipe
from rlkd.config.fit import Fitted
from rlkd.config.places import UNWRITTEN, Found, Place
from rlkd.config.schema import Config
from rlkd.core.errors import Problem


@dataclass(frozen=True)
class Written:
    """What the recipe's author wrote, beside the values."""

    path: str = ""
    overrides: tuple[str, ...] = ()
    places: Mapping[str, Place] = field(default_factory=dict)  # dotted key -> where it was set
    expressions: Mapping[str, str] = field(default_factory=dict)  # dotted key -> `${…}`, where there is one

    def locate(self, finding: contradictions.Finding) -> tuple[Problem, Place]:
        """A finding, at the first of its keys that was written, else at their section, else at the recipe.

        What was set on the command line comes first: the recipe was probably right before.
        """
        sections = [key.rpartition(".")[0] for key in finding.keys]
        written = [k for k in finding.keys if k in self.places] or [k for k in sections if k in self.places]
        places = sorted((self.places[k] for k in written), key=lambda place: not place.on_command_line)
        place = places[0] if places else Place(self.path or finding.keys[0], (UNWRITTEN, 0, 0))
        return Problem(finding.code, finding.what, fix=finding.fix), place


@dataclass(frozen=True)
class Loaded(Config):
    """A Config that remembers where it comes from."""

    written: Written = field(default_factory=Written, repr=False, compare=False)


def load(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The recipe at `path` with `overrides` (`a.b=value`) on top. ConfigError with all of its problems."""
    found = Found()
    config = made(recipe.read(str(path), overrides, found), str(path), overrides, found)
    found.stop_if_any()
    assert config is not None  # what could not be built was reported
    return config


def made(section: recipe.Section, path: str, overrides: Sequence[str], found: Found) -> Config | None:
    """The Config of what was read; problems go to `found`. None if it could not be built."""
    fitted = Fitted.of(section, path, found)
    written = Written(path, tuple(overrides), fitted.places, fitted.expressions)
    values = fitted.values()
    if values is None:
        return None
    config = Loaded(**values, written=written)
    for finding in contradictions.findings(config):
        if not any(fitted.is_doubtful(key) for key in finding.keys):
            found.put(*written.locate(finding))
    return config


def check(config: Config, model_context: int | None = None, longest_prompt: int | None = None) -> None:
    """The contradictions again, now that the model's context and the data's longest prompt (tokens) are known.

    ConfigError with all of them.
    """
    found = Found()
    written = config.written if isinstance(config, Loaded) else Written()
    for finding in contradictions.findings(config, model_context, longest_prompt):
        found.put(*written.locate(finding))
    found.stop_if_any()


SECRET_KEY = re.compile(r"(?:^|_)(?:api_?key|secret|password|passwd|token|credentials?)$", re.IGNORECASE)
NO_SECRET = re.compile(r"(?:^|_)(?:bos|eos|pad|cls|sep|mask|unk|stop|end|start|special)_token$", re.IGNORECASE)
REDACTED = "<redacted>"


class _Dumper(yaml.SafeDumper):
    """Quotes whatever recipe.py would not read back as text."""


for _name, _pattern, _first in recipe.IMPLICIT:
    _Dumper.add_implicit_resolver(recipe.TAG + _name, _pattern, _first)


def resolved(config: Config) -> str:
    """The whole configuration as yaml, which `load` reads again.

    An interpolated value is written as its expression: a secret that came from the environment stays there. So is the
    text under a key that is named like a secret left out.
    """
    expressions = config.written.expressions if isinstance(config, Loaded) else {}
    plain = {f.name: _plain(getattr(config, f.name), f.name, expressions) for f in fields(Config)}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any, path: str, expressions: Mapping[str, str]) -> Any:
    if path in expressions:
        return expressions[path]
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name), f"{path}.{f.name}", expressions) for f in fields(value) if f.init
        }
    if isinstance(value, Mapping):
        return {key: _plain(v, f"{path}.{key}", expressions) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{path}.{i}", expressions) for i, v in enumerate(value)]
    key = path.rpartition(".")[2]
    if isinstance(value, str) and value and SECRET_KEY.search(key) and not NO_SECRET.search(key):
        return REDACTED
    return value
