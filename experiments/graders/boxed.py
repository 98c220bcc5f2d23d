"""Where a text says its final answer: in a box, as LaTeX marks it, or behind words that announce it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BRACE = re.compile(r"(?P<open>(?P<box>\\(?:boxed|fbox)\s*)?\{)|(?P<close>\})|\\.", re.DOTALL)
_SPACE = re.compile(r"\s*")
_FILLER = re.compile(r"\\text|\\q?quad|\\[,;:!() \[\]]|[\s${}*]|[A-Za-z](?:_\{?\d\}?)?\s*=")
_JOINED = re.compile(r"[,;]?(?:and|or)|[,;&]|[、，,;]?[和与與及或]|[、，；]")
_GAP = 80
"""Characters that two boxes of a set may lie apart."""

_MARK = re.compile(
    r"\\(?:boxed|fbox)\b|####"
    r"|\banswer\b(?:(?:\s+\w+){0,3}?\s*(?:\bis\b(?!\s+(?:not|either|neither|between)\b)|[:：=])|[\"'*]+\s?[:：=])"
    r"|答案\s*(?:是|为|為|[:：=])",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|(?<!\\)[.!?](?:\s|$)|[。！？]")


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} of a text holds; None where there is none.

    Braces are matched. A box that is not closed or holds nothing is none; of nested ones the inner is the last.
    """
    boxes = _boxes(text)
    return boxes[-1].content(text) if boxes else None


def last_boxes(text: str) -> list[str]:
    """What the last box holds, and those in a row with it: "\\boxed{1}, \\boxed{2} and \\boxed{3}" is one answer.

    Boxes are in a row where a comma, "and" or "or" alone is between them, or that and the "x =" of the next.
    """
    row: list[_Box] = []
    for box in reversed(_boxes(text)):
        if row and not _joined(text, box.end, row[-1].start):
            break
        row.append(box)
    return [box.content(text) for box in reversed(row)]


def announced(text: str) -> Iterator[str]:
    """The rest of the sentence behind each mark ("answer is", "answer:", "####", \\boxed), that of the last mark first.

    It ends before the next mark.
    """
    end = len(text)
    for mark in reversed(list(_MARK.finditer(text))):
        rest = text[mark.end() : end].lstrip("\n :{")
        end = mark.start()
        yield _SENTENCE_END.split(rest, maxsplit=1)[0]


class _Box(NamedTuple):
    start: int
    inside: int
    close: int
    end: int

    def content(self, text: str) -> str:
        return text[self.inside : self.close].strip()


def _boxes(text: str) -> list[_Box]:
    """The boxes that are closed and hold something, in the order of their starts."""
    open_braces: list[re.Match[str]] = []
    found = []
    for brace in _BRACE.finditer(text):
        if brace["open"]:
            open_braces.append(brace)
        elif brace["close"] and open_braces:
            opened = open_braces.pop()
            if opened["box"] and _SPACE.match(text, opened.end()).end() < brace.start():
                found.append(_Box(opened.start(), opened.end(), brace.start(), brace.end()))
    return sorted(found)


def _joined(text: str, end: int, begin: int) -> bool:
    return 0 <= begin - end <= _GAP and _JOINED.fullmatch(_FILLER.sub("", text[end:begin])) is not None
