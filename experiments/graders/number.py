"""Numbers: the final answer is found in running text and compared as an exact fraction.

A number is read whole or not at all. Digits, separators and operators that hang together are one **numeral**. Its value
is that of a decimal, a fraction, a mixed number, a power, a product of those, or an integer with its base, times the
"thousand", "million" or "k" behind it, or the M of $2.5M. Any other
numeral (a sum, a range, a date, a factor of an algebraic term) has no value, rather than that of a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from math import prod

from experiments.graders.boxed import announced, last_boxes
from experiments.graders.plain_text import CURRENCY, LETTER, plain_text

MAX_DIGITS = 1000
"""Characters of the longest numeral that is read, and digits above and below the line of the largest value."""

_BULLET = re.compile(r"^[ \t]*[-+][ \t]+", re.MULTILINE)

_OPERATOR = rf"[ \t]*(?:\*\*?|[-+/^])[ \t]*[{CURRENCY}]?\{{?[-+]?"
_JOINT = rf"[.,:']|_\{{?|{_OPERATOR}|[ ](?=\d{{3}}(?!\d))|[ ]+(?=\d+[ ]?/[ ]?\d)|[eE][-+]?"
_TERM = (
    r"\\(?:pi|sqrt|[dtc]?frac|[dt]?binom|pm|mp|log|ln|exp|sin|cos|tan|cot|infty|theta|alpha|beta|overline)(?![A-Za-z])"
)
_ARGUMENTS = r"(?:[ \t]*\{[^{}\\]*\})*"
_TOKEN = re.compile(
    rf"(?P<term>{_TERM}){_ARGUMENTS}"
    rf"|\\[A-Za-z]+\*?{_ARGUMENTS}"
    rf"|[{LETTER}]+(?:\d\w*(?:\.\d\w*)*|_\{{?\w+\}}?|\^\{{?[-+]?\w+\}}?)*"
    rf"|(?P<sign>(?<![\w.)])[-+][ \t]?)?(?:[{CURRENCY}][ \t]?)?(?P<inner_sign>[-+][ \t]?)?"
    rf"(?P<digits>(?:\d+|(?<![\w.])\.\d+)(?:(?:{_JOINT})\.?\d+\}}?)*)"
)
_GOES_ON = re.compile(rf"[ \t]*(?:[*^]|[√π∞]|\.?{_TERM})|_|[{LETTER}]+\d")

_INTEGER = r"(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+)|[1-9]\d?(?:,\d\d)+,\d{3}|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_MIXED = re.compile(rf"({_INTEGER}) +(\d+)/(\d+)")
_QUOTIENT = re.compile(rf"({_DECIMAL})(?:/({_DECIMAL}))?")
_POWER = re.compile(rf"({_DECIMAL})(?P<mark>[\^eE])([-+]?\d+)")
_BASED = re.compile(r"(\d+)_(\d+)")

_MAGNITUDE = re.compile(r"k\b|[ \t]*(?:(hundred|thousand|million|billion|trillion)s?\b|([千万萬亿億]))", re.IGNORECASE)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDES |= {"千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8}
_ABBREVIATIONS = {"M": 6, "mn": 6, "B": 9, "bn": 9, "T": 12, "tn": 12}
_ABBREVIATION = re.compile(rf"(?:{'|'.join(_ABBREVIATIONS)})(?![\w$])")
_OR = re.compile(r"(?:[ \t]+([^\W\d_]+))?,?[ \t]+or[ \t]+")
_REMARK = re.compile(r"\s*\((?=[^()]*[A-Za-z]{3})[^()]*\)[\s.]*$")

_CHOICE = re.compile(r"\([A-J]\)|(?<![A-Za-z])[A-J][.):]")
_WORD = re.compile(r"[-/]?([^\W\d_]+)(?:\^\{?[-+]?\d\}?)?(?:[-/'.][^\W\d_]+(?:\^\{?[-+]?\d\}?)?)*")
_SPOKEN = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2}|(?<=\s)[hms](?=\s)")
_CALL = re.compile(rf"[{LETTER}]\(")
_ALGEBRA = re.compile(r"[-+*/^_\\|<>≤≥≠∈∪±!√∞\[\]\d]")
_UNIT = re.compile(r"[mgshlLK]|[ckm]m|[km]g|m[lL]|mi|ft|in|th|st|nd|rd|am|pm")


def grade_number(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the final number of `answer` equals that of `gold`: 18, 18.00, $18, "18 eggs", 18% are one number.

    Raises:
        ValueError: the gold holds no number.
    """
    expected = final_number(gold)
    if expected is None:
        raise ValueError(f"the gold {gold!r} holds no number")
    found = final_number(answer)
    return float(found == expected), None if found is None else written(found)


def final_number(text: str) -> Fraction | None:
    """The number that a text ends in; None where there is none, or where the last numeral has no value.

    A box wins: where there is one, its content is read by `only_number`, and boxes in a row must agree. Else it is the
    numeral behind the last mark that one follows ("####", "answer is", "answer:"), past an equals sign in the same
    sentence, or else the last at all. Of two alternatives, "18 or 20", neither is the number.
    """
    if boxes := last_boxes(text):
        values = {only_number(box) for box in boxes}
        return values.pop() if len(values) == 1 else None
    if (alone := only_number(text, words=False)) is not None:
        return alone
    text = _BULLET.sub("", plain_text(text))
    for sentence in announced(text):
        for part in (sentence.rpartition("=")[2], sentence):
            if first := next(_numerals(part), None):
                value, other = _value(first, signed=True), _alternative(first)
                return value if other is None or _value(other) == value else None
    last = before = None
    for numeral in _numerals(text):
        before, last = last, numeral
    if last is None:
        return None
    value, other = _value(last), _alternative(before) if before else None
    return value if other is None or other.end() != last.end() or _value(before) == value else None


def first_number(text: str) -> Fraction | None:
    """The value of the first numeral of a text; None where there is none or it has no value."""
    first = next(_numerals(plain_text(text)), None)
    return _value(first) if first else None


def only_number(text: str, words: bool = True) -> Fraction | None:
    """The value of a text that holds one number, past its last equals sign, and no algebra; None of any other text.

    Args:
        words: whether words and units may stand beside the number. A letter that may be a variable never may.
    """
    if len(text) > 2 * MAX_DIGITS:
        return None
    text = _REMARK.sub("", plain_text(text).strip()).rpartition("=")[2]
    numerals = list(_numerals(text))
    values = {_value(numeral, signed=True) for numeral in numerals}
    if len(values) != 1:
        return None
    ends = [0, *((_abbreviation(numeral) or numeral).end() for numeral in numerals)]
    starts = [*(numeral.start() for numeral in numerals), len(text)]
    beside = _CHOICE.sub("", "\0".join(text[end:start] for end, start in zip(ends, starts, strict=True)))
    if _CALL.search(beside) or _ALGEBRA.search(_WORD.sub(" ", beside)):
        return None
    found = list(_WORD.finditer(beside))
    if found and (not words or any(map(_may_be_variables, found))):
        return None
    return values.pop()


def holds_several(text: str) -> bool:
    """Whether words stand between numbers: "2 hours 30 minutes" is neither 2 nor 30."""
    text = plain_text(text)
    ends = [numeral.end() for numeral in _numerals(text)]
    starts = [numeral.start() for numeral in _numerals(text)]
    return any(_SPOKEN.search(text, end, start) for end, start in zip(ends, starts[1:], strict=False))


def numeral_with_base(text: str) -> tuple[str, int] | None:
    """Digits and base of a text like 1011_2 or 1011_{two}; None of any other."""
    found = _BASED.fullmatch(_compact(plain_text(text).strip(" \n$.")))
    return (found[1].lstrip("0"), int(found[2])) if found and len(found[2]) <= 2 else None


def written(value: Fraction) -> str:
    """A number as a decimal where it is one of at most 40 places, else as a fraction: 18, 0.5, 1/3."""
    places = next((count for count in range(41) if 10**count % value.denominator == 0), None)
    if not places:
        return str(value)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _numerals(text: str) -> Iterator[re.Match[str]]:
    """The numerals of a plain text, and the commands that stand for numbers, such as \\sqrt{3}."""
    return (token for token in _TOKEN.finditer(text) if token["digits"] or token["term"])


def _value(numeral: re.Match[str], signed: bool = False) -> Fraction | None:
    """The value of a numeral in its place; None where it has none.

    Args:
        signed: a minus at the very beginning of the text belongs to the number even if space follows, as it does behind
            "=" or ":"; anywhere else that is a dash.
    """
    text, start, digits = numeral.string, numeral.start(), numeral["digits"]
    before = start - 1
    while before >= 0 and text[before] in " \t":
        before -= 1
    left = text[before] if before >= 0 else ""
    is_factor = (
        left in set("*^√±") or (before == start - 1 and left in set("_/)")) or _GOES_ON.match(text, numeral.end())
    )
    if not digits or len(digits) > MAX_DIGITS or is_factor:
        return None
    factors = [_factor(factor) for factor in _compact(digits).split("*")]
    if None in factors:
        return None
    value = prod(factors, start=Fraction(1)) * _magnitude(numeral)
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        return None
    sign = numeral["sign"] or ""
    if len(sign) > 1 and left not in set("=(:,[{<>≠") and (left or not signed):
        sign = ""
    minus = (sign + (numeral["inner_sign"] or "")).count("-") == 1
    return -value if minus else value


def _alternative(numeral: re.Match[str]) -> re.Match[str] | None:
    """The numeral that a text offers instead of this one: "18 or 20", "18 eggs or 20 eggs".

    None where there is none, or the other is in another unit, as in "90 minutes or 1.5 hours" and "$3 or 300 cents".
    """
    text = numeral.string
    joined = _OR.match(text, numeral.end())
    other = joined and _TOKEN.match(text, joined.end())
    if not other or not (other["digits"] or other["term"]) or _has_currency(numeral) != _has_currency(other):
        return None
    unit = joined[1] or ""
    same = re.match(rf"[ \t]*{unit}\b" if unit else r"(?![ \t]*(?:%|per ?cent))", text[other.end() : other.end() + 80])
    return other if same else None


def _has_currency(numeral: re.Match[str]) -> bool:
    return not set(CURRENCY).isdisjoint(numeral[0])


def _abbreviation(numeral: re.Match[str]) -> re.Match[str] | None:
    """The M of $2.5M. Without a currency it may be a unit; a $ behind it ends LaTeX's mathematics."""
    return _ABBREVIATION.match(numeral.string, numeral.end()) if _has_currency(numeral) else None


def _magnitude(numeral: re.Match[str]) -> int:
    """What a number is counted in: 10 ** 6 before " million", 1 before anything else."""
    if short := _abbreviation(numeral):
        return 10 ** _ABBREVIATIONS[short[0]]
    found = _MAGNITUDE.match(numeral.string, numeral.end())
    if not found:
        return 1
    return 10 ** _MAGNITUDES[(found[1] or found[2]).lower()] if found[1] or found[2] else 1000


def _factor(text: str) -> Fraction | None:
    try:
        if found := _BASED.fullmatch(text):
            return Fraction(int(found[1], int(found[2]))) if 2 <= int(found[2]) <= 36 else None
        if (found := _MIXED.fullmatch(text)) and int(found[2]) < int(found[3]):
            return _decimal(found[1]) + Fraction(int(found[2]), int(found[3]))
        if found := _QUOTIENT.fullmatch(text):
            return _decimal(found[1]) / (_decimal(found[2]) if found[2] else 1)
        if found := _POWER.fullmatch(text):
            base, exponent = _decimal(found[1]), int(found[3])
            if found["mark"] != "^":
                return base * Fraction(10) ** exponent if abs(exponent) <= MAX_DIGITS else None
            return base**exponent if abs(exponent) * len(found[1]) <= MAX_DIGITS else None
    except (ValueError, ZeroDivisionError):
        return None
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ']", "", text))


def _compact(digits: str) -> str:
    """A numeral without currency, braces and the space around operators."""
    return re.sub(rf"[{CURRENCY}{{}}]|[ \t]*([*/^+-])[ \t]*", r"\1", digits).replace("**", "^")


def _may_be_variables(word: re.Match[str]) -> bool:
    """One letter, or two at the very number: 2x, 2ab. A known unit is none."""
    letters, glued = word[1], word.string[word.start(1) - 1 : word.start(1)] == "\0"
    return re.fullmatch(f"[{LETTER}]{{1,{1 + glued}}}", letters) is not None and not _UNIT.fullmatch(letters)
