"""What of an answer is graded."""

from __future__ import annotations


def after_thought(text: str) -> str:
    """The text behind the last closing `</think>`; all of it where there is none."""
    return text.rpartition("</think>")[2]
