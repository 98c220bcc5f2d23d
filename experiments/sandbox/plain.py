"""Plain values over a socket, between two programs that do not trust each other; copied into the sandbox.

A value is a line of JSON, as Python writes it (with NaN and Infinity). None, booleans, numbers, strings and lists are
themselves; a value of another kind is an object with the name of its kind as the only key: `{"tuple": [1, 2]}`,
`{"dict": [[1, "a"], [2, "b"]]}`, `{"int": "0x..."}` beyond 64 bits. The receiver builds all of it anew from Python's
own kinds, so the sender has a say in the value, and none in how it compares. An iterator is sent as the values that are
left in it, a view of a dictionary and an array of NumPy as what they hold.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import IO, Any


class NotPlain(TypeError):
    """A value that can't be sent; the text is its kind."""


def send(channel: IO[bytes], encoded: Any) -> None:
    """Write a value as `encode` gives it."""
    channel.write(json.dumps(encoded).encode() + b"\n")
    channel.flush()


def receive(channel: IO[bytes]) -> Any:
    """Read a value.

    Raises:
        EOFError: there is none.
        ValueError, TypeError, LookupError: what was sent is not a plain value.
    """
    line = channel.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line, object_hook=_build)


def encode(value: Any) -> Any:
    """The value as JSON writes it; a subclass is sent as the kind that it extends, a number of NumPy as Python's.

    Raises:
        NotPlain: it, or a value in it, is of no kind that can be sent.
    """
    match value:
        case int() if not -(1 << 63) <= value < 1 << 63:
            return {"int": hex(value)}
        case None | str() | int() | float():
            return value
        case list():
            return [encode(item) for item in value]
        case bytes() | bytearray():
            return {_kind(value, bytearray, bytes): value.hex()}
        case complex():
            return {"complex": [value.real, value.imag]}
        case dict():
            pairs = [[encode(key), encode(item)] for key, item in value.items()]
            return {_kind(value, Counter, OrderedDict, defaultdict, dict): pairs}
        case tuple() | set() | frozenset():
            return {_kind(value, tuple, set, frozenset): [encode(item) for item in value]}
        case deque():
            return {"deque": [[encode(item) for item in value], value.maxlen]}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case KeysView() | ValuesView() | ItemsView():
            kind = next(kind.__name__ for kind in (KeysView, ValuesView, ItemsView) if isinstance(value, kind))
            return {kind: [encode(item) for item in value]}
        case Iterator():
            return {"iterator": [encode(item) for item in value]}
    kind = type(value)
    if (kind.__module__, kind.__name__) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return {kind.__name__: str(value)}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray" and value.dtype.kind in "biufcU":
        return {"ndarray": [value.dtype.str, encode(value.tolist())]}
    raise NotPlain(kind.__name__)


def put_back(mine: Any, theirs: Any) -> None:
    """What the other side did to an argument in place is done to ours."""
    match mine:
        case list() | bytearray() if isinstance(theirs, type(mine)):
            mine[:] = theirs
        case dict() | set() if isinstance(theirs, dict if isinstance(mine, dict) else set):
            mine.clear()
            mine.update(theirs)
        case deque() if isinstance(theirs, deque):
            mine.clear()
            mine.extend(theirs)
        case _ if type(mine).__name__ == "ndarray" and getattr(theirs, "shape", None) == mine.shape:
            mine[...] = theirs


def _kind(value: Any, *kinds: type) -> str:
    return next(kind.__name__ for kind in kinds if isinstance(value, kind))


def _build(tagged: dict[str, Any]) -> Any:
    ((kind, content),) = tagged.items()
    return BUILDERS[kind](content)


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


def _fraction(text: str) -> Any:
    from fractions import Fraction

    return Fraction(text)


def _array(parts: list[Any]) -> Any:
    import numpy

    return numpy.array(parts[1], dtype=parts[0])


BUILDERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda digits: int(digits, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "OrderedDict": OrderedDict,
    "defaultdict": lambda pairs: defaultdict(None, pairs),
    "deque": lambda parts: deque(*parts),
    "range": lambda parts: range(*parts),
    "KeysView": lambda items: dict.fromkeys(items).keys(),
    "ValuesView": lambda items: dict(enumerate(items)).values(),
    "ItemsView": lambda items: dict(items).items(),
    "iterator": iter,
    "ndarray": _array,
    "Decimal": _decimal,
    "Fraction": _fraction,
}
