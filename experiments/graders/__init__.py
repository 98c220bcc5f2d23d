"""Graders: an answer's text and the gold in, a score out."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.errors import UsageError, one_line
from experiments.graders.bounded import BoundedGrader, GradingError
from experiments.graders.code import SANDBOX
from experiments.graders.registry import GRADERS, Grader
from experiments.graders.thought import after_thought
from experiments.graders.turns import grade_turns

__all__ = ["GRADERS", "Grade", "Grader", "get_grader", "grade"]


@dataclass(frozen=True)
class Grade:
    """The grade of one answer.

    Attributes:
        score: in [0, 1]; the mean over the questions of a chain or a conversation.
        extracted: the final answer as the grader read it.
        error: a fault of the grader.
        places: the score of each question of a chain or a conversation; None for a single question.
        recalls: the score of each recall of a conversation; None for anything else.
    """

    score: float | None
    extracted: str | None = None
    error: str | None = None
    places: list[float] | None = None
    recalls: list[float] | None = None


TURN_BY_TURN = (grade_turns, BoundedGrader("turns"))
"""These read a list of answers, each with its own thought."""


def get_grader(name: str, allow_code_execution: bool = False) -> Grader:
    """The grader of that name, within limits of time and memory: those of `bounded`, and of its sandbox for "code".

    Raises:
        UsageError: there is none, or it runs the model's programs and that is not allowed or not possible here.
    """
    if name not in GRADERS:
        raise UsageError(f"workload.grader={name}: must be one of {', '.join(GRADERS)}")
    if name == "code":
        if not allow_code_execution:
            raise UsageError(
                "workload.grader=code: would run the Python programs in the model's answers on this machine, in a "
                "sandbox; workload.allow_code_execution=true allows it"
            )
        if reason := SANDBOX.check():
            raise UsageError(
                f"workload.grader=code: there is no sandbox here ({reason}); grade elsewhere: "
                "workload.grader=none now, then `python -m experiments.regrade RUN --grader code` where there is one"
            )
    return GRADERS[name] if name in ("code", "none") else BoundedGrader(name)


def grade(grader: Grader, answer: str, gold: str) -> Grade:
    """Grade one answer; thought before a closing `</think>` is not part of it.

    A grader that raises or reaches a limit scores 0 and its fault is kept: only this answer is affected.
    """
    final = answer if grader in TURN_BY_TURN else after_thought(answer)
    try:
        score, extracted = grader(final, gold)
    except GradingError as error:
        return Grade(0.0, error=str(error))
    except Exception as error:
        return Grade(0.0, error=one_line(error))
    places, recalls = (score["places"], score["recalls"]) if isinstance(score, dict) else (score, None)
    if isinstance(places, list):
        return Grade(sum(places) / len(places), extracted, places=places, recalls=recalls)
    return Grade(score, extracted)
