"""Mathematics: answers that are equal as numbers, or as expressions by the library math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from experiments.graders.boxed import announced, last_boxes
from experiments.graders.number import holds_several, numeral_with_base, only_number

MAX_CHARACTERS = 2000
"""Of the longest expression that is parsed, and of the end of an answer in which one is looked for."""
MAX_ALONE = 200
"""Characters of the longest sentence that may be one expression as a whole, without marks around it."""
PLACES = 6
"""Decimal places that are compared, which is also math-verify's default: 0.333333 equals 1/3."""

_AROUND = re.compile(r"\A(?:\s|\\[,;: ])+|(?:\s|\\[,;:! ]|(?<!\\)[.,;。])+\Z")
_EQUATION = re.compile(r"\s*\$?\s*[A-Za-z]\w*\s*=[^=]*")


class _Expression(NamedTuple):
    text: str
    parsed: list[Any]

    @property
    def written(self) -> str | None:
        """As it was written, where the library kept that."""
        kept = [item for item in self.parsed if isinstance(item, str)]
        return (kept or [str(item) for item in self.parsed] or [self.text or None])[0]


def grade_math(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the final expression of the answer equals the gold: 0.5, 1/2 and \\frac{1}{2} are one answer.

    A box wins: where there is one, the last holds the answer, and boxes in a row are a set. Else it is what stands in
    the sentence behind the last "answer is", or else the last expression of the text.

    Numbers are read as `grade_number` reads them, so 25\\% equals 25. A numeral with a base is the number that it
    writes: 1011_2 equals 11 and not 1011_3. Where the gold has a base, digits alone are in that base.

    Raises:
        ValueError: the gold can't be parsed.
    """
    expected = _boxed(gold)
    if not expected.parsed:
        raise ValueError(f"the gold {gold!r} can't be parsed")
    if boxes := [_AROUND.sub("", box) for box in last_boxes(answer)]:
        final = _boxed(", ".join(boxes))
        # A row may also give one value in several ways.
        equal = _equal(final, expected) or (len(boxes) > 1 and all(_equal(_boxed(box), expected) for box in boxes))
        return float(equal), final.written
    for final in _said(answer):
        if _equal(final, expected):
            return 1.0, final.written
    return 0.0, final.written


def _boxed(text: str) -> _Expression:
    return _Expression(text, _parse(f"\\boxed{{{text}}}"))


def _said(answer: str) -> Iterator[_Expression]:
    """The readings of an answer without a box: a sentence or line that is an expression, or one that is found there."""
    end = answer[-MAX_CHARACTERS:].strip()
    sentence = next(announced(answer), "").strip()
    alone = _AROUND.sub("", sentence or end.rpartition("\n")[2]).strip("$")
    if len(alone) <= MAX_ALONE:
        yield _boxed(alone)
    if sentence and (parsed := _parse(f"The answer is {sentence}.")):
        yield _Expression(sentence, parsed)
    else:
        yield _Expression("", _parse(end))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # What the library logs repeats the whole answer; its faults are raised here instead.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if len(text) > 2 * MAX_CHARACTERS:
        return []
    text = re.sub(
        r"\d", lambda digit: str(int(digit[0])), text
    )  # of any script; the library fails on others than 0 to 9
    return parse(text, parsing_timeout=None, raise_on_error=True)


def _equal(found: _Expression, expected: _Expression) -> bool:
    from math_verify import verify

    given, asked = numeral_with_base(found.text), numeral_with_base(expected.text)
    number, wanted = _number(found.text, words=True), _number(expected.text, words=False)
    if given or asked:
        digits = found.text.strip("$ ").lstrip("0")
        return given == asked or (asked is not None and digits == asked[0]) or (number == wanted is not None)
    if number is not None and wanted is not None:
        return round(number, PLACES) == round(wanted, PLACES)
    if wanted is not None and holds_several(found.text):
        return False
    return bool(found.parsed) and verify(expected.parsed, found.parsed, timeout_seconds=None, raise_on_error=True)


def _number(text: str, words: bool) -> Fraction | None:
    """The number that a text is, or that it says a variable to be."""
    if "=" in text and not _EQUATION.fullmatch(text):
        return None
    return only_number(text, words)
