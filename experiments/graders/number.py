"""Numbers: the final answer is found in running text and compared as an exact fraction."""

from __future__ import annotations

import re
from fractions import Fraction

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# A minus after a word, a number or a bracket is a subtraction, no sign.
NUMBER = re.compile(rf"(?<![\w.)])-?\$?-?(?:{_INTEGER}\s?/\s?0*[1-9]\d*(?![\w.])|{_INTEGER}(?:\.\d+)?|\.\d+)")
MARK = re.compile(r"\\boxed\b|####|\banswer\b(?:\s+\w+){0,3}?\s*(?:\bis\b|:|=)", re.IGNORECASE)


def grade_number(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the final number of `answer` equals that of `gold`: 18, 18.00, $18, "18 eggs" are one number.

    Raises:
        ValueError: the gold holds no number.
    """
    expected = final_number(gold)
    if expected is None:
        raise ValueError(f"the gold {gold!r} holds no number")
    found = final_number(answer)
    return float(found is not None and Fraction(found) == Fraction(expected)), found


def final_number(text: str) -> str | None:
    """The number that a text ends in, as `Fraction` reads it; None where it holds none.

    That is the number after the last mark that a number follows (\\boxed, "####", "answer is", "answer:"), past an
    equals sign in the same sentence, or else the last number at all.
    """
    text = _plain(text)
    for mark in reversed(list(MARK.finditer(text))):
        sentence = re.split(r"\n|[.!?](?:\s|$)", text[mark.end() :].lstrip("\n :{"), maxsplit=1)[0]
        numbers = NUMBER.findall(sentence.rpartition("=")[2]) or NUMBER.findall(sentence)
        if numbers:
            return _bare(numbers[0])
    numbers = NUMBER.findall(text)
    return _bare(numbers[-1]) if numbers else None


def _plain(text: str) -> str:
    """Fractions, separators, signs and emphasis of LaTeX and Markdown in plain characters."""
    text = text.replace("−", "-").replace("–", "-").replace("\\$", "$").replace("*", "")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"\1/\2", text)
    return re.sub(r"\{,\}|\\[,!;:]", ",", text)


def _bare(number: str) -> str:
    return re.sub(r"[\s$,]", "", number)
