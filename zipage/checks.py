"""Options checked: names, types and ranges, each declared beside the field it belongs to.

A field of a dataclass says its range in its annotation: `block_size: Annotated[int, at_least(1)]`. Every float must be
finite, every int has at most 64 bits. NumPy's numbers count as Python's, an int as a float, but neither a bool as a
number nor a number as a bool.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

NAMES = {int: "of type int, of at most 64 bits", float: "a finite number"}
"""What a message calls a type, where that is more than its name."""


class Range(NamedTuple):
    """Values that are allowed, and how a message says so."""

    holds: Callable[[Any], bool]
    text: str


def at_least(low: float) -> Range:
    return Range(lambda value: value >= low, f"at least {low}")


def between(low: float, high: float) -> Range:
    return Range(lambda value: low <= value <= high, f"in [{low}, {high}]")


def above(low: float, high: float) -> Range:
    """Above `low`, up to `high`."""
    return Range(lambda value: low < value <= high, f"in ({low}, {high}]")


def one_of(*values: str) -> Range:
    return Range(values.__contains__, f"one of {', '.join(values)}")


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise a ValueError that names the first unknown key and the closest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown option {name!r}; {hint}")


def check_fields(options: Any, prefix: str = "") -> None:
    """Check all fields of a dataclass, and give them the plain Python values of their types.

    Args:
        options: an instance, which may be frozen.
        prefix: before a field's name in messages.

    Raises:
        ValueError: a value is of another type or outside its range; the message names field, value and remedy.
    """
    for name, hint in _hints(type(options)).items():
        object.__setattr__(options, name, checked(f"{prefix}{name}", getattr(options, name), hint))


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as what the annotation `hint` asks for.

    Raises:
        ValueError: it is of another type or outside its range.
    """
    hint, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    or_none = ", or None" if NoneType in kinds else ""
    if value is None and or_none:
        return None
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    result = _as(value, kind)
    if result is None:
        raise ValueError(f"{name}={shown(value)}: must be {_name(kind)}{or_none}")
    for allowed in ranges:
        if not allowed.holds(result):
            raise ValueError(f"{name}={shown(value)}: must be {allowed.text}{or_none}")
    return result


def shown(value: Any) -> str:
    """A value for a message, on one line and not longer than it helps."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"an integer of {int(value).bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or None where it is something else."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) and -(2**63) <= value < 2**64 else None
    if kind is float:
        return _finite(value) if isinstance(value, numbers.Real) else None
    if get_origin(kind) is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple)):
            return None
        parts = tuple(_as(part, get_args(kind)[0]) for part in value)
        return None if None in parts else parts
    kind = get_origin(kind) or kind
    return value if isinstance(value, kind) else None


def _finite(value: Any) -> float | None:
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def _name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of values of type {get_args(kind)[0].__name__}"
    if kind in NAMES:
        return NAMES[kind]
    return f"of type {(get_origin(kind) or kind).__name__}"


@cache
def _hints(options: type) -> Mapping[str, Any]:
    hints = get_type_hints(options, include_extras=True)
    return {f.name: hints[f.name] for f in fields(options)}
