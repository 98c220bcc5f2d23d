"""LaTeX, Markdown and typography in the few characters that numbers are read from."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

CURRENCY = "$€£¥₹₩₽₫฿₱₺₴"
LETTER = "A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ"
"""Letters of alphabets in which a letter beside a digit makes a name, as in x1; those of other scripts stand apart."""

_CHARACTERS = str.maketrans(
    {code: code - 0xFEE0 for code in range(0xFF10, 0xFF1A)}
    | dict(zip("−–‐‑－×⋅∙·＊÷⁄／＋（）％．：＝≈", "-----*****///+()%.:==", strict=True))
    | dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " ")
    | dict.fromkeys("\u200b\u2060\ufeff")
    | {"，": ", ", "、": ", ", "’": "'"}
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "sixteen": 16}
_TEXT = r"\\(?:text|math|mbox|hbox|emph|operatorname|underline|bold|small|large)[a-z]*\s*\{([^{}]*)\}"
_PLACES = r"\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))"


def plain_text(text: str) -> str:
    """The text with fractions as a/b, products as *, powers as ^, and without spacing, emphasis and \\text{}."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text


def _words(found: re.Match[str]) -> str:
    """What \\text{} holds; words stand apart from what is beside them, and take their exponent along: cm^2."""
    content, exponent = found[1], found[2] or ""
    return f" {content} " if any(map(str.isalpha, content)) else content + exponent


def _fraction(found: re.Match[str]) -> str:
    before, numerator, denominator = found[1], found[2] or found[3], found[4] or found[5]
    return f"{before} {numerator}/{denominator}" if before else f"{numerator}/{denominator}"


def _superscript(found: re.Match[str]) -> str:
    return f"^{{{unicodedata.normalize('NFKC', found[0]).replace('−', '-')}}}"


def _vulgar(found: re.Match[str]) -> str:
    before, fraction = found[1], unicodedata.normalize("NFKC", found[2]).replace("⁄", "/")
    return f"{before} {fraction}" if before else fraction


def _star(found: re.Match[str]) -> str:
    """A product is kept: 2*9, 2 * 9, x*2. Other stars are emphasis."""
    text, start, end = found.string, found.start(), found.end()
    before, after = text[start - 1 : start], text[end : end + 1]
    spaced = before in (" ", "\t") and after in (" ", "\t")
    tight = _OPERAND_ENDS.fullmatch(before) and _OPERAND_BEGINS.fullmatch(after)
    power = before.isdigit() and after.isdigit()
    product = (spaced or tight) if end - start == 1 else (power and end - start == 2)
    return found[0] if product else ""


_DEGREE = r"\^?\s?\{?\s?\\(?:circ|degree)(?![A-Za-z])\s?\}?"
_STYLE = r"(?:display|text|script)style|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|rm"
_OPERAND_ENDS = re.compile(r"[0-9A-Za-z)}]")
_OPERAND_BEGINS = re.compile(r"[0-9A-Za-z({\\$.-]")
_REPLACEMENTS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r",\s*\\!\s*|\{,\}"), ","),
    (re.compile(rf"(?:°|{_DEGREE})[\s~]*(?:\\(?:mathrm|text|rm)\s*\{{?\s*)?[CFK](?![A-Za-z])\s*\}}?"), " "),
    (re.compile(rf"\\!|\\(?:left|right|[bB]igg?[lr]?|limits|{_STYLE})(?![A-Za-z])"), ""),
    (re.compile(r"\\\\(?![A-Za-z])"), "\n"),
    (re.compile(rf"\\[,;:> ()\[\]]|[~°]|\\q?quad(?![A-Za-z])|{_DEGREE}"), " "),
    (re.compile(r"\\(?=[$%#&£])"), ""),
    (re.compile(rf"{_TEXT}(\s*\^\s*\{{?[-+]?\d\}}?)?"), _words),
    (re.compile(rf"{_TEXT}(\s*\^\s*\{{?[-+]?\d\}}?)?"), _words),  # one within the other
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])|(?<=\d)\s?[xX]\s?(?=10\s?(?:\^|\*\*|[⁰¹²³⁴-⁹⁻]))"), " * "),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:approx|simeq|doteq)(?![A-Za-z])|=>"), "="),
    (re.compile(r"[<>!]="), "≠"),
    (re.compile(rf"(\d?)\s?(?<![\^_])\\[dtc]?frac{_PLACES}{_PLACES}(?!\d)"), _fraction),
    (re.compile(r"(\d?)([¼-¾⅐-⅞])"), _vulgar),
    (re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+"), _superscript),
    (re.compile(rf"(?<=\d)_\{{?\s?({'|'.join(_BASES)})\b\s?\}}?"), lambda found: f"_{_BASES[found[1]]}"),
    (re.compile(r"(?<![A-Za-z])(?:Rs|USD|EUR|GBP|CNY|RMB|JPY|INR|US(?=\$))\.?\s?(?=[\d.$])"), "$"),
    (re.compile(r"^[ \t]*\*[ \t]+", re.MULTILINE), ""),
    (re.compile(r"\*+"), _star),
    (re.compile(r"(?<![\w)}\]])_+|_+(?![\w{\\])"), ""),
]
