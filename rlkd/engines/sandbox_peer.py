"""How an answer's process and its tests' process talk: calls one way, plain data the other. Runs inside the sandbox.

The tests never share an interpreter with the answer: they hold a `Remote` where a name of the answer stands, and what
comes back of a call is plain data (None, truth values, numbers, texts, bytes, lists, tuples, sets, dicts, ranges,
Fraction, Decimal) built anew on this side, or another `Remote`. So an answer can patch its own builtins, its own
`__eq__`, its own interpreter, and reach no comparison of a test. Two `Remote` are equal if they are the same object,
and none is equal to data: the answer is never asked whether it is right.

Standard library only; the text of this file is run there, not imported.
"""

import builtins
import json
import os
import struct
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LARGEST = 1 << 26  # bytes of one message
MOST = 1_000_000  # items that are taken of an iterator
_LENGTH = struct.Struct(">I")
_SMALL = 1 << 53


def send(channel: int, message: Any) -> None:
    frame = json.dumps(message).encode()
    frame = _LENGTH.pack(len(frame)) + frame
    while frame:
        frame = frame[os.write(channel, frame) :]


def receive(channel: int) -> Any:
    """The next message; EOFError at the end. Reads not a byte more, so that another process can read on."""
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    if length > LARGEST:
        raise EOFError("a message that is too long")
    return json.loads(_exactly(channel, length))


def _exactly(channel: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.read(channel, min(length, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


class Cannot(Exception):
    """A test asks for something that does not go from one process to the other."""


class Remote:
    """An object of the other process."""

    def __init__(self, peer: "Peer", number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask(self, "call", arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask(self, "attribute", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask(self, "set", (name, value))

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask(self, "item", (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.ask(self, "set_item", (key, value))

    def __iter__(self) -> Any:
        return iter(self._peer.ask(self, "list", ()))

    def __next__(self) -> Any:
        return self._peer.ask(self, "next", ())

    def __len__(self) -> int:
        return int(self._peer.ask(self, "length", ()))

    def __str__(self) -> str:
        return str(self._peer.ask(self, "text", ()))

    def __repr__(self) -> str:
        return str(self._peer.ask(self, "shown", ()))

    def __bool__(self) -> bool:
        return bool(self._peer.ask(self, "truth", ()))

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and bool(self._peer.ask(self, "is_instance", (instance,)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


def _first(values: Any) -> list[Any]:
    taken: list[Any] = []
    for value in values:
        if len(taken) == MOST:
            raise Cannot(f"more than {MOST} items of an iterator")
        taken.append(value)
    return taken


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, *arguments, **named: thing(*arguments, **named),
    "attribute": getattr, "set": setattr, "item": lambda thing, key: thing[key], "list": _first, "next": next,
    "set_item": lambda thing, key, value: thing.__setitem__(key, value), "length": len, "text": str, "shown": repr,
    "truth": bool, "is_instance": lambda thing, other: isinstance(other, thing),
}  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)  # of the tests, which the answer may call


class Peer:
    """One end of the connection. `open_` says whether the other side may do anything with what it is given (the
    answer's end), or only call functions it was handed (the tests' end)."""

    def __init__(self, channel: int, open_: bool) -> None:
        self.channel, self.open = channel, open_
        self.given: list[Any] = []

    def ask(self, target: Remote, operation: str, arguments: tuple[Any, ...], named: Any = None) -> Any:
        """Has the other side do it. Lists, dicts and sets that it changed in place are changed here too."""
        request = {"on": target._number, "do": operation, "with": [self.packed(a) for a in arguments]}
        send(self.channel, request | {"named": {k: self.packed(v) for k, v in (named or {}).items()}})
        while True:
            message = receive(self.channel)
            if "do" in message:
                self.serve(message)
                continue
            for place, value in message.get("changed", []):
                _change(arguments[place], self.unpacked(value))
            if "raised" in message:
                raise _exception(message["raised"])
            return self.unpacked(message["value"])

    def serve(self, request: dict[str, Any]) -> None:
        """Does one thing the other side asks for, and says what came of it."""
        arguments = [self.unpacked(a) for a in request["with"]]
        before = {i: self.packed(a) for i, a in enumerate(arguments) if type(a) in (list, dict, set)}
        reply: dict[str, Any]
        try:
            target = self.given[request["on"]]
            if not self.open and (request["do"] != "call" or not isinstance(target, _FUNCTIONS)):
                raise Cannot("an answer can call what the tests give it, and nothing else")
            named = {k: self.unpacked(v) for k, v in request["named"].items()}
            reply = {"value": self.packed(OPERATIONS[request["do"]](target, *arguments, **named))}
        except BaseException as e:  # whatever the answer raises is the tests' to judge
            reply = {"raised": [_known(type(e)), f"{e}"[:2000]]}
        after = {i: self.packed(arguments[i]) for i in before}
        reply["changed"] = [[i, value] for i, value in after.items() if value != before[i]]
        send(self.channel, reply)

    def packed(self, value: Any) -> Any:
        """Plain data as JSON, anything else by number."""
        try:
            return self._packed(value)
        except RecursionError:
            return self._handed(value)

    def _packed(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | str | float):
            return value if value is None or isinstance(value, bool) else _plain(value)
        if isinstance(value, int):
            return int(value) if -_SMALL < value < _SMALL else {"int": hex(value)}
        if isinstance(value, dict):
            return {"dict": [[self._packed(k), self._packed(v)] for k, v in value.items()]}
        for kind, name in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
            if isinstance(value, kind):
                return {name: [self._packed(v) for v in value]}
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value).hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if type(value) is Fraction:
            return {"fraction": [hex(value.numerator), hex(value.denominator)]}
        if type(value) is Decimal:
            return {"decimal": str(value)}
        if str(type(value).__module__).partition(".")[0] == "numpy" and hasattr(value, "tolist"):
            return self._packed(value.tolist())
        name = value.__name__ if isinstance(value, type) else ""
        if name and getattr(builtins, name, None) is value:
            return {"builtin": name}
        return self._handed(value)

    def _handed(self, value: Any) -> Any:
        if isinstance(value, Remote) and value._peer is self:
            return {"yours": value._number}
        self.given.append(value)
        return {"mine": len(self.given) - 1}

    def unpacked(self, data: Any) -> Any:
        """What was packed. Only data: nothing that is read here runs."""
        if not isinstance(data, dict):
            return data
        ((kind, value),) = data.items()
        match kind:
            case "int":
                return int(value, 16)
            case "list" | "tuple" | "set" | "frozenset":
                made = (self.unpacked(v) for v in value)
                return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](made)
            case "dict":
                return {self.unpacked(k): self.unpacked(v) for k, v in value}
            case "bytes":
                return bytes.fromhex(value)
            case "complex":
                return complex(*value)
            case "range":
                return range(*value)
            case "fraction":
                return Fraction(int(value[0], 16), int(value[1], 16))
            case "decimal":
                return Decimal(value)
            case "builtin":
                return _builtin_type(value)
            case "yours":
                return self.given[value]
            case "mine":
                return Remote(self, int(value))
        raise Cannot(f"no data: {kind}")


def _plain(value: Any) -> Any:
    """A subclass of str or float as its base."""
    return str.__str__(value) if isinstance(value, str) else float.__float__(value)


def _builtin_type(name: str) -> Any:
    found = getattr(builtins, name, None)
    if not isinstance(found, type):
        raise Cannot(f"no type of Python: {name}")
    return found


def _change(old: Any, new: Any) -> None:
    if isinstance(old, list) and isinstance(new, list):
        old[:] = new
    elif isinstance(old, dict | set) and type(new) is type(old):
        old.clear()
        old.update(new)


def _known(kind: type[BaseException]) -> str:
    """The nearest exception of Python itself above this one."""
    return next((c.__name__ for c in kind.__mro__ if getattr(builtins, c.__name__, None) is c), "Exception")


def _exception(raised: list[str]) -> BaseException:
    """An exception of Python by name; what would end a process or a test's interpreter is an ordinary one here."""
    kind = getattr(builtins, raised[0], None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError(f"{raised[0]}: {raised[1]}")
    try:
        return kind(raised[1])
    except TypeError:  # UnicodeDecodeError and the like want more
        return RuntimeError(f"{raised[0]}: {raised[1]}")
