"""Reads recipes: yaml with `defaults`, then `a.b=c` of the command line, merged; every key keeps its place.

`defaults: [base, model/tiny]` names files beside the recipe (without .yaml), merged in order, the recipe's own keys
last. Sections merge key by key; everything else, lists too, is replaced. Yaml is read by the rules of its version 1.2
where 1.1 surprises: `off`, `on`, `yes` and `no` are text, `1e-6` is a number, `1:30` and dates are text.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from rlkd.config.places import COMMAND_LINE, Entry, Found, Place, did_you_mean, similar

Section = dict[str, Entry]

TWICE = "RLKD-C006"  # a key stands twice
MOST_VALUES = 5_000  # of one file, aliases counted each time: a recipe has hundreds
DEEPEST = 30  # sections in sections
TAG = "tag:yaml.org,2002:"
_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
IMPLICIT = [
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _name, _pattern, _first in IMPLICIT:
    _Loader.add_implicit_resolver(TAG + _name, _pattern, _first)


def read(path: str, overrides: Sequence[str], found: Found) -> Section:
    """The merged recipe. ConfigError if a file or an override cannot be read; other problems go to `found`."""
    section, above = parts(path, overrides, found)
    for one in above:
        section = merged(section, one)
    return section


def parts(path: str, overrides: Sequence[str], found: Found) -> tuple[Section, list[Section]]:
    """What the files say, and each override as a section. Raises as `read` does."""
    section = _Files(found).read(path, None, ())
    above = [_override(text, number, found) for number, text in enumerate(overrides)]
    if found.codes() - {TWICE}:  # what is missing from what was read says nothing about the recipe
        found.stop_if_any()
    return section, above


def merged(below: Section, above: Section) -> Section:
    """`above` over `below`: sections key by key, everything else as a whole."""
    result = dict(below)
    for key, entry in above.items():
        old = result.get(key)
        if old is not None and isinstance(old.value, dict) and isinstance(entry.value, dict):
            place = old.place if entry.place.on_command_line else entry.place
            entry = Entry(place, merged(old.value, entry.value))
        result[key] = entry
    return result


class _Files:
    """Follows `defaults` from file to file."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.order = 0  # how many files were begun

    def read(self, path: str, named: Place | None, above: tuple[str, ...]) -> Section:
        """A file over its defaults. `named` is where another file names it, `above` the files on the way to it."""
        self.order += 1
        order = self.order
        real = os.path.abspath(path)
        if real in above:
            way = " → ".join(os.path.basename(p) for p in (*above[above.index(real) :], real))
            assert named is not None  # only a file can name a file that is above it
            self.found.add("RLKD-C007", f"`defaults` go round in a circle: {way}", named, "leave this one out")
            return {}
        text = self._text(path, named, order)
        if text is None:
            return {}
        own = Document(path, text, order, self.found).section()
        section: Section = {}
        for entry in self._defaults(own.pop("defaults", None)):
            name = str(entry.value)
            file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
            beside = os.path.normpath(os.path.join(os.path.dirname(path), file))
            section = merged(section, self.read(beside, entry.place, (*above, real)))
        return merged(section, own)

    def _defaults(self, entry: Entry | None) -> list[Entry]:
        if entry is None:
            return []
        names = entry.value if isinstance(entry.value, list) else [entry]
        if all(isinstance(e.value, str) and e.value for e in names) and names is entry.value:
            return names
        what = f"`defaults` must be a list of names of recipes, not {entry.shown()}"
        self.found.add("RLKD-C007", what, entry.place, "for example `defaults: [base, model/tiny]`")
        return []

    def _text(self, path: str, named: Place | None, order: int) -> str | None:
        place = named or Place(path, (order, 0, 0))
        try:
            return Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            self.found.add("RLKD-C001", f"{path} is not UTF-8 text (byte {e.start})", place, "is it a recipe?")
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            code = "RLKD-C001" if named is None else "RLKD-C007"
            self.found.add(code, f"cannot read the recipe {path!r}: {reason.lower()}", place, _other_recipes(path))
        return None


def _other_recipes(path: str) -> str | None:
    """Recipes of the same folder that may have been meant."""
    folder = Path(os.path.dirname(path) or ".")
    try:
        names = sorted(p.name for p in folder.glob("*.yaml"))
    except (OSError, ValueError):
        return None
    close = similar(os.path.basename(path), names) or similar(os.path.basename(path) + ".yaml", names)
    if close:
        return did_you_mean([str(folder / name) for name in close])
    return f"{folder} has {', '.join(names)}" if names else None


class Document:
    """One yaml text as entries. What it cannot read it reports, and leaves out."""

    def __init__(self, path: str, text: str, order: int, found: Found, fixed: Place | None = None) -> None:
        self.path, self.text, self.order, self.found, self.fixed = path, text, order, found, fixed
        self.lines = _LINE_END.split(text)
        self.values = 0
        self.open: set[int] = set()  # nodes that we are inside of: an alias to one of them would never end

    def section(self) -> Section:
        """The document as one section; an empty document is an empty one."""
        entry = self.entry()
        if entry is None or entry.value is None:
            return {}
        if isinstance(entry.value, dict):
            return entry.value
        self.found.add("RLKD-C003", f"a recipe is a section of keys, not {entry.shown()}", entry.place, "key: value")
        return {}

    def entry(self) -> Entry | None:
        """The whole document; None if it is empty or cannot be read."""
        try:
            node = yaml.compose(self.text, Loader=_Loader)
            return None if node is None else self._entry(node)
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            what = ", ".join(part for part in (e.problem, e.context) if part)
            line = self.lines[mark.line] if mark and mark.line < len(self.lines) else ""
            fix = 'inside of { } and [ ] an interpolation needs quotes: "${…}"' if "${" in line else None
            self._unreadable(what, self._place(mark.line, mark.column) if mark else None, fix)
        except yaml.reader.ReaderError as e:  # a character that yaml does not allow
            before = _LINE_END.split(self.text[: e.position])
            self._unreadable(f"{e.reason}: {chr(e.character)!r}", self._place(len(before) - 1, len(before[-1])))
        except RecursionError:
            self._unreadable("it is nested too deeply", None)
        return None

    def _unreadable(self, what: str, place: Place | None, fix: str | None = None) -> None:
        place = place or self.fixed or Place(self.path, (self.order, 0, 0))
        self.found.add("RLKD-C005", f"cannot be read as yaml: {what}", place, fix)

    def _place(self, line: int, column: int, width: int = 1) -> Place:
        return self.fixed or Place.in_file(self.path, self.lines, line, column, width, self.order)

    def _at(self, node: yaml.Node) -> Place:
        start, end = node.start_mark, node.end_mark
        return self._place(start.line, start.column, end.column - start.column if end.line == start.line else 1)

    def _entry(self, node: yaml.Node, place: Place | None = None) -> Entry:
        """A value, at the place of its key if it has one."""
        place = place or self._at(node)
        self.values += 1
        if id(node) in self.open or self.values > MOST_VALUES or len(self.open) > DEEPEST:
            why = f"over {MOST_VALUES} values" if self.values > MOST_VALUES else "it is nested too deeply"
            why = "an alias inside of what it stands for" if id(node) in self.open else why
            raise yaml.MarkedYAMLError(problem=why, problem_mark=node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return Entry(place, self._scalar(node), node.value)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
                return Entry(place, self._mapping(node))
            if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
                return Entry(place, [self._entry(item) for item in node.value])
        finally:
            self.open.discard(id(node))
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not known here", problem_mark=node.start_mark)

    def _mapping(self, node: yaml.MappingNode) -> Section:
        section: Section = {}
        for key_node, value_node in node.value:
            place = self._at(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value in ("", "<<"):
                self.found.add("RLKD-C005", "a key must be a word", place, "to take over other keys, use `defaults`")
                continue
            key = str(key_node.value)
            if key in section:
                first = section[key].place.where
                self.found.add(TWICE, f"the key `{key}` stands here twice", place, f"the first is at {first}")
                continue
            section[key] = self._entry(value_node, place)
        return section

    def _scalar(self, node: yaml.ScalarNode) -> str | int | float | bool | None:
        kind = node.tag.removeprefix(TAG)
        if kind not in ("str", "null", "bool", "int", "float"):
            raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not known here", problem_mark=node.start_mark)
        try:
            value: str | int | float | bool | None = _Loader("").construct_object(node)
        except (ValueError, KeyError) as e:  # `!!int x`
            raise yaml.MarkedYAMLError(problem=f"no {kind}: {node.value[:60]!r}", problem_mark=node.start_mark) from e
        return value


def _override(text: str, number: int, found: Found) -> Section:
    """`a.b=value` as a section. The value is read as yaml; only one that starts with [, {, \" or ' has structure."""
    place = Place(f"command line: {text}", (COMMAND_LINE, number, 0))
    path, equals, written = text.partition("=")
    keys = _keys(path)
    if not equals or not all(keys):
        found.add("RLKD-C008", f"`{text}` is not of the form key=value", place, "for example learner.lr=1e-6")
        return {}
    entry = _value(written, place, found)
    if entry is None:
        return {}
    for key in reversed(keys):
        entry = Entry(place, {key: entry})
    assert isinstance(entry.value, dict)
    return entry.value


def _value(written: str, place: Place, found: Found) -> Entry | None:
    if written.startswith(("[", "{", '"', "'")):
        return Document("command line", written, COMMAND_LINE, found, fixed=place).entry()
    if not written:
        return Entry(place, "", "")
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, written, (True, False))
    node = yaml.ScalarNode(tag, written)
    try:
        return Entry(place, loader.construct_object(node), written)
    except ValueError:  # more digits than Python reads
        found.add("RLKD-C008", "the number has too many digits", place)
        return None


def _keys(path: str) -> list[str]:
    """The keys of a dotted path. A reward's import path (`rewards.my.module:name.weight`) is one key."""
    section, _, rest = path.partition(".")
    if section == "rewards" and ":" in rest:
        module, tail = rest.split(":", 1)
        name, *options = tail.split(".")
        return [section, f"{module}:{name}", *options]
    return path.split(".")
