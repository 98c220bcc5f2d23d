"""The graders by name: an answer's text and the gold in, a score out."""

from __future__ import annotations

from typing import Protocol

from experiments.graders.chain import grade_chain
from experiments.graders.code import grade_code
from experiments.graders.exact import grade_exact
from experiments.graders.f1 import grade_f1
from experiments.graders.final import grade_final
from experiments.graders.literal import grade_literal
from experiments.graders.mathematics import grade_math
from experiments.graders.number import grade_number
from experiments.graders.turns import grade_turns
from experiments.graders.ungraded import grade_none

Score = float | list[float] | dict[str, list[float]] | None


class Grader(Protocol):
    def __call__(self, answer: str, gold: str) -> tuple[Score, str | None]:
        """The score in [0, 1], and what was taken for the final answer; None for either where there is none.

        The score of a chain of questions is a list with the score of each; that of a conversation has those of its
        questions under "places" and those of its recalls under "recalls".
        """


GRADERS: dict[str, Grader] = {
    "number": grade_number,
    "math": grade_math,
    "exact": grade_exact,
    "final": grade_final,
    "f1": grade_f1,
    "literal": grade_literal,
    "code": grade_code,
    "chain": grade_chain,
    "turns": grade_turns,
    "none": grade_none,
}
