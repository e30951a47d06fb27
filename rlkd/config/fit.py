"""Fits a recipe into the dataclasses of schema.py, of its algorithm and of its rewards."""

import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlkd.algorithms import TABLE, algorithm
from rlkd.config import kinds
from rlkd.config.omega import structured, why_unresolved
from rlkd.config.places import UNWRITTEN, Entry, Found, Place, did_you_mean, similar
from rlkd.config.recipe import Section
from rlkd.config.schema import Config
from rlkd.core.errors import Problem, RlkdError
from rlkd.rewards.table import REWARDS, find

Lookup = Callable[[str], type[Any]]


@dataclass
class Fitted:
    """A recipe's values, checked one by one, with what is known of each key. Made by `of`."""

    root: DictConfig
    found: Found
    recipe: Place  # where to put what has no line of its own
    places: dict[str, Place] = field(default_factory=dict)
    expressions: dict[str, str] = field(default_factory=dict)  # dotted key -> `${…}` as written
    doubtful: set[str] = field(default_factory=set)  # keys and sections with a problem: nothing follows from them
    classes: dict[str, type[Any]] = field(default_factory=dict)  # of `algorithm`, and of each `rewards.NAME`
    unmade: set[str] = field(default_factory=set)  # `algorithm` or `rewards.NAME` that cannot be made at all
    known: list[str] = field(default_factory=list)  # dotted keys of the whole schema
    pending: list[tuple[DictConfig, type[Any], str, str, Any]] = field(default_factory=list)  # to be resolved

    @classmethod
    def of(cls, section: Section, path: str, found: Found) -> "Fitted":
        root = structured(Config)
        root.rewards = {}
        for key, hint in kinds.settings(Config).items():
            inner = kinds.section_of(hint)
            if inner is not None and OmegaConf.is_missing(root, key):
                root[key] = structured(inner)
        fitted = cls(root, found, Place(path, (UNWRITTEN, 0, 0)))
        fitted._choose_classes(section)
        fitted.known = kinds.dotted(Config, "") + [k for at, c in fitted.classes.items() for k in kinds.dotted(c, at)]
        fitted._fill(root, Config, section, "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OmegaConf warns of `${oc.env:A,}`; it is an error below
            for pending in fitted.pending:
                fitted._resolve(*pending)
        fitted._missing(root, Config, "")
        return fitted

    def is_doubtful(self, key: str) -> bool:
        return any(_within(key, d) or _within(d, key) for d in self.doubtful)

    def values(self) -> dict[str, Any] | None:
        """The arguments of Config, with the rewards that could be made; None if anything else could not be made."""
        if "algorithm" in self.unmade:
            return None
        values = {name: self._object(self.root, name, name) for name in kinds.settings(Config) if name != "rewards"}
        parent = self.root.rewards
        rewards = {name: self._object(parent, name, f"rewards.{name}") for name in parent}
        values["rewards"] = {name: r for name, r in rewards.items() if r is not None}
        if len(values["rewards"]) < len(rewards):
            self.doubtful.add("rewards")
        return values if all(path.startswith("rewards.") for path in self.unmade) else None

    # -- one section -------------------------------------------------------------------------------------------------

    def _choose_classes(self, section: Section) -> None:
        """The dataclasses that the recipe chooses by name, of `algorithm` and of each reward, put into the root."""
        entry = section.get("algorithm")
        keys = entry.value if entry is not None and isinstance(entry.value, dict) else {}
        name = keys.get("name")
        if entry is not None and not isinstance(entry.value, dict):
            what = f"`algorithm` must be a section, not {entry.shown()}"
            self._problem("RLKD-C003", what, "algorithm", entry.place, "write `algorithm: {name: …}`")
        elif name is None or name.value is None:
            self._nameless(entry.place if entry else None, keys)
        else:
            self._choose(self.root, "algorithm", "algorithm", name, algorithm, name.text or name.shown())
        rewards = section.get("rewards")
        if rewards is None or rewards.value == {}:
            fix = f"for example `rewards: {{exact: {{}}}}`; one of {', '.join(REWARDS)}, or your own"
            self._problem("RLKD-C004", "there are no rewards", "rewards", rewards.place if rewards else None, fix)
        elif isinstance(rewards.value, dict):
            for key, entry in rewards.value.items():
                self._choose(self.root.rewards, key, f"rewards.{key}", entry, find, key)

    def _nameless(self, place: Place | None, section: Section) -> None:
        """The algorithm has no name; perhaps there is one under a key that was misspelt."""
        names = f"one of {', '.join(TABLE)}, or your own as package.module:Class"
        for key in section:
            if key != "name" and similar(key, ["name"]):
                what = f"unknown key `algorithm.{key}`, and `algorithm.name` is missing"
                self._problem("RLKD-C002", what, "algorithm", section[key].place, f"did you mean `name`?  ({names})")
                return
        self._problem("RLKD-C004", "`algorithm.name` is missing", "algorithm", place, names)

    def _choose(self, parent: DictConfig, key: str, at: str, entry: Entry, table: Lookup, name: str) -> None:
        try:
            cls = table(name)
            parent[key] = structured(cls)
            self.classes[at] = cls
        except RlkdError as e:
            for problem in e.problems:
                self.found.put(problem, entry.place)
            self.doubtful |= {at, at.partition(".")[0]}
            self.unmade.add(at)
        except Exception as e:  # OmegaConf or typing, about a user's class
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            what = f"the options of `{name}` cannot be read from yaml: {reason}"
            fix = "give its fields plain types: int, float, bool, str, Literal, list, tuple, dict or such a dataclass"
            self._problem("RLKD-C010", what, at, entry.place, fix)
            self.doubtful.add(at.partition(".")[0])
            self.unmade.add(at)

    def _fill(self, target: DictConfig, cls: type[Any], section: Section, at: str) -> None:
        hints = kinds.settings(cls)
        for key, entry in section.items():
            path = f"{at}.{key}" if at else key
            self.places[path] = entry.place
            if key not in hints:
                self._unknown(key, entry, hints, at)
            elif path == "algorithm":
                if isinstance(entry.value, dict) and not self.is_doubtful(path):
                    self._fill(target.algorithm, self.classes[path], entry.value, path)
            elif path == "rewards":
                self._rewards(target.rewards, entry)
            elif inner := kinds.section_of(hints[key]):
                self._section(target, key, inner, hints[key], entry, path)
            elif inner := kinds.sections_of(hints[key]):
                self._sections(target[key], inner, hints[key], entry, path)
            else:
                self._leaf(target, cls, key, hints[key], entry, path)

    def _rewards(self, target: DictConfig, entry: Entry) -> None:
        if not isinstance(entry.value, dict):
            self._wrong(dict[str, Any], entry, "rewards", "for example `rewards: {exact: {}}`")
            return
        for key, reward in entry.value.items():
            path = f"rewards.{key}"
            self.places[path] = reward.place
            if not isinstance(reward.value, dict):
                what = f"`{path}` must be a section of the reward's options, not {reward.shown()}"
                self._problem("RLKD-C003", what, path, reward.place, f"write `{key}: {{}}` for its defaults")
            elif key in target:
                self._fill(target[key], self.classes[path], reward.value, path)

    def _section(self, target: DictConfig, key: str, inner: type[Any], hint: Any, entry: Entry, path: str) -> None:
        if isinstance(entry.value, dict):
            if target[key] is None:
                target[key] = structured(inner)
            self._fill(target[key], inner, entry.value, path)
        elif entry.value is None and kinds.without_none(hint)[1]:
            target[key] = None
        else:
            self._wrong(hint, entry, path)

    def _sections(self, target: DictConfig, inner: type[Any], hint: Any, entry: Entry, path: str) -> None:
        if not isinstance(entry.value, dict):
            self._wrong(hint, entry, path)
            return
        for name, each in entry.value.items():
            self.places[f"{path}.{name}"] = each.place
            if isinstance(each.value, dict):
                target[name] = structured(inner)
                self._fill(target[name], inner, each.value, f"{path}.{name}")
            else:
                self._wrong(inner, each, f"{path}.{name}", f"write `{name}: {{}}` for its defaults")

    def _leaf(self, target: DictConfig, cls: type[Any], key: str, hint: Any, entry: Entry, path: str) -> None:
        try:
            OmegaConf.update(target, key, kinds.value_of(entry, hint), merge=False)
        except (kinds.WrongType, OmegaConfBaseException, TypeError, ValueError) as e:
            if any("${" in text for text in entry.texts(path).values()):
                what = f"`{path}` has an interpolation that cannot be read: {entry.shown()}"
                self._problem("RLKD-C009", what, path, entry.place, r"write ${oc.env:NAME} or ${section.key}, or \${")
            else:
                self._wrong(hint, entry, path, str(e).splitlines()[0] if _is_any(hint) and str(e) else None)
            return
        expressions = {p: text for p, text in entry.texts(path).items() if "${" in text}
        if expressions:
            self.expressions |= expressions
            self.pending.append((target, cls, key, path, hint))

    # -- interpolations, and what is missing -------------------------------------------------------------------------

    def _resolve(self, target: DictConfig, cls: type[Any], key: str, path: str, hint: Any) -> None:
        """Looks an interpolation up; the message shows the expression, never the value, which may be a secret."""
        try:
            value = target[key]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
            return
        except (OmegaConfBaseException, RecursionError, ValueError, TypeError, KeyError, Warning) as e:
            written = next(text for p, text in self.expressions.items() if _within(p, path))
            what, fix = why_unresolved(e, path, written, hint, self.known)
            self._problem("RLKD-C009", what, path, self.places.get(path), fix)
        value = kinds.default(cls, key)
        if value is MISSING:
            self.unmade.add(next((at for at in self.classes if _within(path, at)), path))
        else:
            OmegaConf.update(target, key, value, merge=False)

    def _missing(self, target: DictConfig, cls: type[Any], at: str) -> None:
        for key, hint in kinds.settings(cls).items():
            path = f"{at}.{key}" if at else key
            inner = kinds.section_of(hint)
            if OmegaConf.is_missing(target, key):
                self._is_missing(target, key, hint, path, self.places.get(at))
            elif inner is not None and target[key] is not None:
                self._missing(target[key], inner, path)
            elif (inner := kinds.sections_of(hint)) is not None:
                for name in target[key]:
                    self._missing(target[key][name], inner, f"{path}.{name}")
            elif path == "algorithm":
                self._missing(target[key], self.classes[path], path)
            elif path == "rewards":
                for name in target.rewards:
                    self._missing(target.rewards[name], self.classes[f"{path}.{name}"], f"{path}.{name}")

    def _is_missing(self, target: DictConfig, key: str, hint: Any, path: str, section: Place | None) -> None:
        if not self.is_doubtful(path):
            fix = f"add it to the recipe, or {path}=… to the command: {kinds.in_words(hint)}"
            self._problem("RLKD-C004", f"`{path}` is missing", path, section, fix)
        if path == "model.path":
            target[key] = ""  # so that the rest can be checked
        else:
            self.unmade.add(next((at for at in self.classes if _within(path, at)), path.partition(".")[0]))

    def _object(self, parent: DictConfig, key: str, path: str) -> Any:
        """The frozen dataclass, or the plain value. A reward's own complaint about its options becomes a problem."""
        if path in self.unmade:
            return None
        try:
            value = parent[key]
            return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        except RlkdError as e:
            for problem in e.problems:
                self.found.put(problem, self.places.get(path, self.recipe))
        except Exception as e:  # of a user's __post_init__
            self._problem("RLKD-C011", f"`{path}`: {type(e).__name__}: {e}", path, self.places.get(path))
        self.unmade.add(path)
        return None

    # -- messages ----------------------------------------------------------------------------------------------------

    def _problem(self, code: str, what: str, path: str, place: Place | None, fix: str | None = None) -> None:
        self.found.put(Problem(code, what, fix=fix), place or self.recipe)
        self.doubtful.add(path)

    def _wrong(self, hint: Any, entry: Entry, path: str, fix: str | None = None) -> None:
        section = kinds.section_of(hint)
        if section is not None and entry.value is None:
            keys = ", ".join(kinds.settings(section))
            fix = f"write some of its keys ({keys}), or leave it out for its defaults"
            self._problem("RLKD-C003", f"the section `{path}` is empty", path, entry.place, fix)
            return
        meant = did_you_mean(similar(entry.text or "", [str(c) for c in kinds.choices(hint)]))
        what = f"`{path}` must be {kinds.in_words(hint)}, not {entry.shown()}"
        self._problem("RLKD-C003", what, path, entry.place, fix or meant or None)

    def _unknown(self, key: str, entry: Entry, hints: dict[str, Any], at: str) -> None:
        path = f"{at}.{key}" if at else key
        meant = similar(key, list(hints)) or [k for k in self.known if k.rpartition(".")[2] == key]
        others = [k for k in hints if k not in meant]
        also = f"({'also ' if meant else ''}known here: {', '.join(others)})" if others else "(nothing is known here)"
        what = f"unknown key `{path}`"
        if at == "algorithm":
            name = OmegaConf.to_container(self.root.algorithm).get("name")  # type: ignore[union-attr]
            owners = [n for n in TABLE if n != name and key in kinds.settings(algorithm(n))]
            what = f"unknown key `{path}`: the algorithm {name} has no such setting"
            what += f" (it is one of {', '.join(owners)})" if owners else ""
        self._problem("RLKD-C002", what, path, entry.place, f"{did_you_mean(meant)}  {also}".strip())
        self.doubtful |= {at} if at else set(meant)


def _within(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


def _is_any(hint: Any) -> bool:
    return hint is Any or kinds.without_none(hint)[0] in (dict, dict[str, Any])
