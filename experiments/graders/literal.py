"""Python values: what an expression or a call gives, compared without running anything."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

_MARKED = re.compile(r"\[ANSWER\](.*?)(?:\[/ANSWER\]|\Z)", re.DOTALL)


def grade_literal(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the last [ANSWER]...[/ANSWER] of the answer, else its last line, is the value of `gold`.

    What stands before "==" (an assertion repeated) is left out. 'a' and "a" are one value, (1, 2) and [1, 2] two.

    Raises:
        ValueError: the gold is not a Python value.
    """
    expected = _value(gold)
    if expected is None:
        raise ValueError(f"the gold {gold!r} is not a Python value")
    marked = _MARKED.findall(answer)
    lines = (marked[-1] if marked else answer).strip().splitlines() or [""]
    final = (" ".join(lines) if marked else lines[-1]).strip().strip("`").strip()
    found = _value(final) or _value(final.partition("==")[2])
    return float(found is not None and found[0] == expected[0]), final or None


def _value(text: str) -> tuple[Any] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about the model's text
            return (ast.literal_eval(text.strip()),)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
