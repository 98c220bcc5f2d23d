"""What stands behind the last "Answer:", to the letter."""

from __future__ import annotations


def grade_final(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the rest of the line behind the last "Answer:" equals the gold; space around either does not count."""
    _, mark, rest = answer.rpartition("Answer:")
    final = rest.split("\n", 1)[0].strip() if mark else ""
    return float(bool(mark) and final == gold.strip()), final or None
