"""One question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A question and the answer that counts as right.

    Attributes:
        id: names it within its workload.
        question: its text, without any instruction.
        gold: the right answer.
        kind: of a generated problem.
    """

    id: str
    question: str
    gold: str
    kind: str | None = None
