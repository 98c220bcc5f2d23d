"""Mathematics: answers that are equal as expressions, by the library math-verify."""

from __future__ import annotations

import logging
from typing import Any

from experiments.graders.boxed import last_boxed

TIMEOUT = 5
"""Seconds for each parse and each comparison. The library keeps time by a signal, so it grades in the main thread."""


def grade_math(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the last \\boxed{} of the answer, else its final expression, equals the gold.

    0.5, 1/2 and \\frac{1}{2} are one answer.

    Raises:
        ValueError: the gold can't be parsed, or this is not the main thread.
        TimeoutError: parsing or comparing took longer than `TIMEOUT` seconds.
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    # What the library logs repeats the whole answer; its faults are raised here instead.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    boxed = last_boxed(answer)
    final = answer if boxed is None else f"\\boxed{{{boxed}}}"
    try:
        expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=TIMEOUT, raise_on_error=True)
        if not expected:
            raise ValueError(f"the gold {gold!r} can't be parsed")
        found = parse(final, parsing_timeout=TIMEOUT, raise_on_error=True)
        equal = bool(found) and verify(expected, found, timeout_seconds=TIMEOUT, raise_on_error=True)
    except TimeoutException as error:  # no Exception: it would pass every other handler
        raise TimeoutError(f"math-verify took longer than {TIMEOUT} s") from error
    return float(equal), _text(found)


def _text(found: list[Any]) -> str | None:
    """The final expression as it was written, where the library kept that."""
    written = [item for item in found if isinstance(item, str)]
    return (written or [str(item) for item in found] or [None])[0]
