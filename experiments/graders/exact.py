"""The answer is the gold, to the letter."""

from __future__ import annotations


def grade_exact(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the answer equals the gold; space around either does not count."""
    final = answer.strip()
    return float(final == gold.strip()), final or None
