"""Graders: an answer's text and the gold in, a score out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from experiments.errors import UsageError, one_line
from experiments.graders.exact import grade_exact
from experiments.graders.mathematics import grade_math
from experiments.graders.number import grade_number


class Grader(Protocol):
    def __call__(self, answer: str, gold: str) -> tuple[float, str | None]:
        """The score in [0, 1], and what was taken for the final answer (None: nothing was found)."""


GRADERS: dict[str, Grader] = {"number": grade_number, "math": grade_math, "exact": grade_exact}


@dataclass(frozen=True)
class Grade:
    """The score of one answer in [0, 1], its final answer as the grader read it, and any fault of the grader."""

    score: float
    extracted: str | None = None
    error: str | None = None


def get_grader(name: str) -> Grader:
    """Raises UsageError for an unknown name."""
    if name not in GRADERS:
        raise UsageError(f"workload.grader={name}: must be one of {', '.join(GRADERS)}")
    return GRADERS[name]


def grade(grader: Grader, answer: str, gold: str) -> Grade:
    """Grade one answer; thought before a closing `</think>` is not part of it.

    A grader that raises scores 0 and its fault is kept: it costs this answer, not the run.
    """
    final = answer.rpartition("</think>")[2]
    try:
        score, extracted = grader(final, gold)
    except Exception as error:
        return Grade(0.0, error=one_line(error))
    return Grade(score, extracted)
