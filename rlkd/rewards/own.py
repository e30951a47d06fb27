"""A user's own reward: a frozen dataclass, or a plain function that becomes one."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from rlkd.core.errors import ConfigError, nearest
from rlkd.core.types import Answer, Prompt

_TARGETS: dict[type[Any], str] = {}  # where a class that was loaded here can be found again


@dataclass(frozen=True)
class Function:
    """A reward made of `call(prompt, answer_text, **options) -> float`; the fields beside `weight` are its options."""

    weight: float = 1.0
    call: ClassVar[Callable[..., float]]

    def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float | None]:
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight"}
        return [type(self).call(prompt, a.text, **options) for a in answers]


def load_own(target: str) -> type[Any]:
    """The dataclass behind `package.module:name` or `path/to/file.py:name`. ConfigError if it cannot be had."""
    where, _, name = target.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    module = _file(Path(where).expanduser().resolve(), target) if is_file else _module(where, target)
    found = getattr(module, name, None)
    if found is None:
        close = nearest(name, dir(module))
        hint = f"; did you mean {close!r}?" if close else ""
        raise ConfigError("RLKD-C302", f"{where} has nothing named {name!r}{hint}", where=f"reward {target}")
    made = found if inspect.isclass(found) else _of_function(found, name, target)
    if not is_dataclass(made) or not callable(getattr(made, "score", None)):
        raise ConfigError(
            "RLKD-C303",
            f"{target} is no reward: it must be a dataclass with `weight` and score(prompt, answers), or a function",
            fix="put @dataclass(frozen=True) over the class, and see rlkd/rewards/exact.py for an example",
        )
    if "weight" not in {f.name for f in fields(made)}:
        raise ConfigError("RLKD-C303", f"{target} has no field `weight`", fix="add `weight: float = 1.0`")
    _TARGETS[made] = f"{module.__file__}:{name}" if is_file else target
    return made


def target_of(made: type[Any]) -> str:
    """Where another process finds the class. ConfigError for one that only this process knows."""
    if made in _TARGETS:
        return _TARGETS[made]
    if made.__module__ == "__main__" or "<locals>" in made.__qualname__:
        raise ConfigError(
            "RLKD-C302",
            f"the reward {made.__qualname__} of {made.__module__} cannot be imported by the verifier's processes",
            fix="put it at the top level of a file of its own and name it as path/to/file.py:name",
        )
    return f"{made.__module__}:{made.__qualname__}"


def _module(name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        fix = "is its folder on PYTHONPATH or its package installed? A file works too: path/to/file.py:name"
        raise _not_imported(target, e, fix) from e


def _file(path: Path, target: str) -> ModuleType:
    """The module of a file, under a name that its path decides, so that every process calls it the same."""
    if not path.is_file():
        raise ConfigError("RLKD-C302", f"there is no file {path}", where=f"reward {target}", fix="check the path")
    name = f"rlkd_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("RLKD-C302", f"{path} is no Python file", where=f"reward {target}", fix="name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise _not_imported(target, e, "run the file with python to see the whole error") from e
    return module


def _not_imported(target: str, error: BaseException, fix: str) -> ConfigError:
    what = f"the reward {target} cannot be imported: {type(error).__name__}: {error}"
    return ConfigError("RLKD-C302", what, fix=fix)


def _of_function(found: Any, name: str, target: str) -> type[Any]:
    """A dataclass whose options are the function's parameters after (prompt, answer_text)."""
    expected = "expected a function (prompt, answer_text) -> float; further parameters need a default"
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise ConfigError("RLKD-C303", f"{target} is no plain function", fix=expected)
    try:
        parameters = list(inspect.signature(found, eval_str=True).parameters.values())
    except (TypeError, ValueError, NameError) as e:
        raise ConfigError("RLKD-C303", f"{target} has no signature to read: {e}", fix=expected) from e
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first, rest = parameters[:2], parameters[2:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    fits = len(first) == 2 and all(p.kind in plain for p in first)
    if not fits or any(p.default is p.empty or p.kind not in named for p in rest):
        raise ConfigError("RLKD-C303", f"{target} takes {inspect.signature(found)}", fix=expected)
    options = [(p.name, Any if p.annotation is p.empty else p.annotation, p.default) for p in rest]
    try:
        return make_dataclass(name, options, bases=(Function,), namespace={"call": staticmethod(found)}, frozen=True)
    except (TypeError, ValueError) as e:
        raise ConfigError("RLKD-C303", f"the parameters of {target} cannot be options: {e}", fix=expected) from e
