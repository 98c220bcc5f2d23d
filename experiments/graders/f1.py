"""Short answers in running text, by the words they share with the gold (SQuAD, LongBench)."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def grade_f1(answer: str, gold: str) -> tuple[float, str | None]:
    """The F1 of precision and recall over words, case, punctuation and articles aside, in [0, 1].

    `gold` holds one right answer a line; the best match counts.

    Raises:
        ValueError: the gold has no words.
    """
    golds = [found for line in gold.splitlines() if (found := words(line))]
    if not golds:
        raise ValueError(f"the gold {gold!r} has no words")
    said = words(answer)
    return max(_f1(said, expected) for expected in golds), " ".join(said) or None


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(said: list[str], expected: list[str]) -> float:
    shared = (Counter(said) & Counter(expected)).total()
    return 2 * shared / (len(said) + len(expected))
