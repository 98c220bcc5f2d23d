"""The answers to several questions, each graded separately by its final number."""

from __future__ import annotations

import json
import re

from experiments.graders.number import grade_number

HEADING = re.compile(r"^[\W_]*Answer\s+(\d+)\b", re.MULTILINE | re.IGNORECASE)
"""A line that begins "Answer 3", whatever marks stand before it."""


def grade_chain(answer: str, gold: str) -> tuple[list[float], str]:
    """Grade what follows each heading "Answer N" as `number` does.

    Args:
        gold: a JSON list of the golds in order.

    Returns:
        One grade for each place of the chain, and the numbers that were read, a JSON list. A place without a heading
        scores 0. Where a heading stands twice, all that follows either belongs to its place.
    """
    golds = json.loads(gold)
    texts = split_answers(answer, len(golds))
    graded = [(0.0, None) if text is None else grade_number(text, one) for text, one in zip(texts, golds, strict=True)]
    return [score for score, _ in graded], json.dumps([extracted for _, extracted in graded])


def split_answers(text: str, length: int) -> list[str | None]:
    """What follows each of the headings "Answer 1" to "Answer `length`"; None where there is none."""
    found = list(HEADING.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    parts: list[str | None] = [None] * length
    for match, end in zip(found, ends, strict=False):
        place = int(match[1][:9]) - 1
        if 0 <= place < length:
            parts[place] = (parts[place] or "") + text[match.end() : end] + "\n"
    return parts
