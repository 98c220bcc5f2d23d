"""Which options there are, and which of them hold text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from experiments.config.schema import Experiment

BESIDE = {"sweep": "NAME", "share_model": "true", "arms": "[1,2]"}
"""What a command line may add with `+` though it is no option of a run, and a value of it."""


@cache
def groups() -> dict[str, type]:
    return {name: hint for name, hint in get_type_hints(Experiment).items() if is_dataclass(hint)}


def is_text(option: str) -> bool:
    """Whether an option holds text, or a list of texts; it is given by its dotted name, also of a workload's part."""
    return _text_hint(option) is not None


def is_list_of_texts(option: str) -> bool:
    return bool(
        {list, tuple, Sequence} & {get_origin(hint) for hint in (_text_hint(option), *get_args(_text_hint(option)))}
    )


def _text_hint(option: str) -> Any:
    """The type of a field of text; None for any other."""
    return _text_hints().get(re.sub(r"^workload\.parts\.[^.]+\.", "workload.", option))


@cache
def _text_hints() -> dict[str, Any]:
    owners = {"": Experiment} | {f"{group}.": cls for group, cls in groups().items()}
    hints = {owner + name: hint for owner, cls in owners.items() for name, hint in get_type_hints(cls).items()}
    return {name: hint for name, hint in hints.items() if str in _leaves(hint) <= {str, type(None), Ellipsis}}


def _leaves(hint: Any) -> set[Any]:
    """The types that a type hint is made of."""
    return set().union(*map(_leaves, get_args(hint))) or {hint}


@cache
def known_keys() -> frozenset[str]:
    inside = {f"{group}.{f.name}" for group, cls in groups().items() for f in fields(cls)}
    return frozenset(f.name for f in fields(Experiment)) | inside
