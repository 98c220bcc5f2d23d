"""Options are checked by the annotations of the dataclass that holds them.

`window: Annotated[int, at_least(1)] = 16` says it all: the type, and a `Rule` beyond it.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

LONG = 100
"""Characters or items beyond which a value is no slip of the pen, and is not shown."""
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)
"""The largest and the smallest normal float32, in which the device computes."""


@dataclass(frozen=True)
class Rule:
    """A condition on a value of the right type. `what` ends the sentence "must be ..."."""

    holds: Callable[[Any], bool]
    what: str


def at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"at least {low}")


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"in [{low}, {high}]")


def power_of_two(low: int, high: int = 2**62) -> Rule:
    what = f"a power of two from {low}" + (f" to {high}" if high < 2**62 else "")
    return Rule(lambda value: low <= value <= high and value & (value - 1) == 0, what)


def one_of(*choices: Any) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(map(str, choices))}")


Count = Annotated[int, at_least(1)]
Odd = Annotated[int, Rule(lambda value: value > 0 and value % 2 == 1, "odd and positive")]
Positive = Annotated[float, Rule(lambda value: value >= SMALLEST, f"positive, at least {SMALLEST:.2g}")]
Unit = Annotated[float, between(0, 1)]
Share = Annotated[float, Rule(lambda value: 0 < value <= 1, "in (0, 1]")]
Text = Annotated[str, Rule(bool, "a text that is not empty")]


def check_fields(instance: Any, where: str = "") -> None:
    """Check every field of a dataclass and store it in the type of its annotation, as `checked` does.

    Args:
        instance: may be frozen. A field's metadata gives the name that users know as "option", where it is another.
        where: stands before the field's name in messages.

    Raises:
        ValueError: a value is of the wrong type or breaks a rule; the message names the field, the value and the rule.
    """
    hints = type_hints(type(instance))
    for f in fields(instance):
        name = where + f.metadata.get("option", f.name)
        object.__setattr__(instance, f.name, checked(name, getattr(instance, f.name), hints[f.name]))


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """The annotations of a class and its bases, rules included."""
    return get_type_hints(cls, include_extras=True)


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` in the type of `hint`: numpy's scalars as Python's, integers for floats as floats, lists as tuples.

    A bool is not a number, and a number is not a bool. Integers have at most 64 bits, floats are finite in float32.

    Args:
        name: of the option, for the message.
        hint: bool, int, float, str, a class, Literal, tuple[X, ...], Mapping[str, X], a union, or Annotated[X, Rule];
            a value of another form is taken unchanged.

    Raises:
        ValueError: it is of another type or breaks a rule; the message names the option, the value and the rule.
    """
    try:
        return _convert(value, hint)
    except _Unfit as unfit:
        raise ValueError(f"{name}={shown(value if unfit.value is None else unfit.value)}: {unfit}") from None


class _Unfit(Exception):
    """Says what a value must be. `value` is the value as converted, where it was of the right type."""

    def __init__(self, what: str, value: Any = None) -> None:
        super().__init__(what)
        self.value = value


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_to_any(value, arguments)
    if origin is Annotated:
        value = _convert(value, arguments[0])
        for rule in arguments[1:]:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise _Unfit(f"must be {rule.what}", value)
        return value
    if origin is Literal:
        return _convert(value, Annotated[Any, one_of(*arguments)])
    if origin is tuple and arguments[1:] == (...,):
        return _convert_items(value, arguments[0])
    kind = origin or hint
    if kind in SCALARS:
        return SCALARS[kind](value)
    if kind is Any or not isinstance(kind, type):
        return value
    if not isinstance(value, kind):
        raise _Unfit(f"must be a {kind.__name__}")
    if kind is Mapping and arguments:
        return dict(zip(_convert_all("key", value, arguments[0]), _convert_all("value", value.values(), arguments[1])))
    return value


def _convert_to_any(value: Any, kinds: tuple) -> Any:
    optional = types.NoneType in kinds
    if optional and value is None:
        return None
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return _convert(value, kind)
            except _Unfit as error:
                unfit = error
    raise _Unfit(f"{unfit}, or None" if optional else str(unfit), unfit.value)


def _convert_items(value: Any, kind: Any) -> tuple:
    try:
        items = None if isinstance(value, str | bytes | Mapping) else list(value)
    except TypeError:
        items = None
    if items is None:
        raise _Unfit("must be a list")
    return tuple(_convert_all("item", items, kind))


def _convert_all(what: str, values: Iterable, kind: Any) -> list:
    try:
        return [_convert(value, kind) for value in values]
    except _Unfit as unfit:
        nested = ":" * str(unfit).startswith("each ")
        raise _Unfit(f"each {what}{nested} {unfit}") from None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _Unfit("must be True or False")
    return bool(value)


def _int(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _Unfit("must be an integer")
    if not -(2**63) <= value < 2**63:
        raise _Unfit("must be an integer of 64 bits")
    return int(value)


def _float(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _Unfit("must be a number")
    # The comparison is of exact numbers, so that no integer is too large for it; NaN fails it.
    if not -LARGEST <= value <= LARGEST:
        raise _Unfit(f"must be a finite number of at most {LARGEST:.2g}")
    return float(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unfit("must be a text")
    return value


SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def shown(value: Any) -> str:
    """A value in one short line, for messages."""
    is_cut = type(value) in (str, bytes, list, tuple) and len(value) > LONG
    try:
        text = " ".join(repr(value[:LONG] if is_cut else value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 and not is_cut else f"{text[:77]}..."


def check_names(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise a ValueError that names the first unknown key, and the known one that was meant or all that are known."""
    known = tuple(known)
    for name in given:
        if name not in known:
            close = closest(name, known)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown option {shown(name)}; {hint}")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` may be a slip of the pen for, else the one that it is a part of, word by word.

    `budgets` is a part of `budget_tokens`, and `max_len` of `max_model_len`. None where no name is close enough, or
    where several have as few words more.
    """
    if len(name) > LONG:  # to compare it would take long
        return None
    known = tuple(known)
    cutoff = 0.6 if len(name) <= 5 else 0.8
    if close := difflib.get_close_matches(name, known, n=1, cutoff=cutoff):
        return close[0]
    more = {whole: left for whole in known if (left := _words_more(name, whole)) is not None}
    nearest = [whole for whole, left in more.items() if left == min(more.values())]
    return nearest[0] if len(nearest) == 1 else None


def _words_more(name: str, whole: str) -> int | None:
    """How many words `whole` has beside those of `name`; None where it lacks one of them, or `name` has none."""
    words, left = _words(name), _words(whole)
    for word in words:
        if not (same := difflib.get_close_matches(word, left, n=1, cutoff=0.8)):
            return None
        left.remove(same[0])
    return len(left) if words else None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())
