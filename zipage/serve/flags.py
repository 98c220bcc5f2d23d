"""Command-line flags of a dataclass of options: `max_model_len: Count | None` is `--max-model-len N`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Union, get_args, get_origin

from zipage.checks import closest, type_hints
from zipage.unsupported import LLM_OPTIONS

NUMBERS = {int: "N", float: "X"}


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str, without: Iterable[str] = ()) -> None:
    """A flag for each field, by the type of its annotation; what is not given stays out of the namespace.

    Values are checked by the dataclass, here only read: numbers, JSON for a mapping, several words for a tuple, and
    `--flag` or `--no-flag` for a bool.
    """
    group = parser.add_argument_group(title)
    hints, texts = type_hints(cls), descriptions(cls)
    for f in fields(cls):
        if f.name not in without:
            default = "" if f.default in (None, MISSING) else f" (default: {f.default})"
            options = _reading(hints[f.name]) | {"help": (texts.get(f.name, "") + default).replace("%", "%%")}
            group.add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS, **options)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _reading(hint: Any) -> dict[str, Any]:
    kind = _plain(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "TEXT"}
    if (get_origin(kind) or kind) is Mapping:
        return {"type": _mapping, "metavar": "JSON"}
    if kind in NUMBERS:
        return {"type": kind, "metavar": NUMBERS[kind]}
    return {"metavar": "TEXT"}


def _plain(hint: Any) -> Any:
    """The type without rules and None."""
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    return hint


def _mapping(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be JSON, such as {{"name": 1}}, not {text!r}') from None


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring's "Attributes" say of each field."""
    _, _, after = inspect.getdoc(cls).partition("Attributes:\n")
    section = after.partition("\n\n")[0]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", section, flags=re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def refusal(unknown: str, known: Iterable[str]) -> str:
    """One line on an argument that no flag takes: what to do instead, where that is known."""
    name = unknown.partition("=")[0].removeprefix("--").replace("-", "_")
    if not unknown.startswith("--"):
        return f"unexpected argument {unknown!r}"
    for option in (name, name.removeprefix("no_")):
        if option in LLM_OPTIONS:
            return f"{unknown} is not supported: {LLM_OPTIONS[option]}"
    close = closest(name, known)
    return f"unknown flag {unknown}; " + (f"did you mean {flag(close)}?" if close else "--help shows all")
