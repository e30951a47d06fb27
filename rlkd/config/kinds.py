"""What type each setting has, in words for people and in values for OmegaConf."""

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlkd.config.places import Entry

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "any value"}
PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


class WrongType(Exception):
    """A value is not of the setting's type; OmegaConf alone would have converted it."""


def settings(cls: type[Any]) -> dict[str, Any]:
    """The settings of a configuration dataclass: name -> type."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def dotted(cls: type[Any], at: str) -> list[str]:
    """The dotted keys of all settings of a dataclass that stands at the key `at` ("" for the top)."""
    keys = []
    for key, hint in settings(cls).items():
        path = f"{at}.{key}" if at else key
        inner = section_of(hint)
        keys += [path, *(dotted(inner, path) if inner else [])]
    return keys


def default(cls: type[Any], name: str) -> Any:
    """The default of a setting; dataclasses.MISSING if it has none."""
    field = next(f for f in fields(cls) if f.name == name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    others = tuple(a for a in get_args(hint) if a is not type(None))
    return (others[0] if len(others) == 1 else Union[others]), len(others) < len(get_args(hint))  # noqa: UP007


def section_of(hint: Any) -> type[Any] | None:
    """The dataclass of a setting that is a section of its own, else None."""
    inner, _ = without_none(hint)
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


def sections_of(hint: Any) -> type[Any] | None:
    """The dataclass of each value of a `dict[str, Dataclass]`, else None."""
    inner, _ = without_none(hint)
    if get_origin(inner) is not dict:
        return None
    return section_of(get_args(inner)[1])


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal; () for other types."""
    inner, _ = without_none(hint)
    return get_args(inner) if get_origin(inner) is Literal else ()


def in_words(hint: Any) -> str:
    """`a whole number or null`, `one of cpu, cuda`, `a list of 2 numbers`."""
    inner, optional = without_none(hint)
    return _in_words(inner) + (" or null" if optional else "")


def _in_words(hint: Any) -> str:
    if hint in WORDS:
        return WORDS[hint]
    if choices(hint):
        return "one of " + ", ".join(str(c) for c in choices(hint))
    if section_of(hint):
        return f"a section ({', '.join(settings(hint))})" if settings(hint) else "an empty section: {}"
    origin, args = get_origin(hint), get_args(hint)
    if origin in (tuple, list):
        count = "" if origin is list or args[-1:] == (...,) else f"{len(args)} "
        return f"a list of {count}{PLURALS.get(args[0], 'values')}"
    if origin is dict or hint is dict:
        return "a section of keys"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(a) for a in get_args(hint))
    return getattr(hint, "__name__", str(hint))


def value_of(entry: Entry, hint: Any) -> Any:
    """The entry's value for a setting of this type; WrongType for what OmegaConf would convert and we do not.

    Text stays as it was written (`1.10`, `true`), a choice may be written without quotes, a number is no truth value
    and quoted digits are no number. An interpolation is converted when it is resolved.
    """
    inner, _ = without_none(hint)
    value = entry.value
    if isinstance(value, str) and "${" in value:
        return value
    if value is None or isinstance(value, dict):
        return entry.plain()
    if isinstance(value, list):
        args = get_args(inner)
        if get_origin(inner) not in (tuple, list) or not args:
            return entry.plain()
        return [
            value_of(e, args[min(i, len(args) - 1)] if args[-1] is not ... else args[0]) for i, e in enumerate(value)
        ]
    if choices(inner):
        return value if value in choices(inner) else entry.text
    if inner is str:
        return entry.text
    if (inner in (int, float) and isinstance(value, str)) or (inner is bool and not isinstance(value, bool | str)):
        raise WrongType
    return value
