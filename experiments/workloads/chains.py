"""Several questions in one prompt, to be answered one after another in one output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from experiments.errors import UsageError
from experiments.workloads.problem import Problem


def chain(problems: Sequence[Problem], length: int, seed: int) -> list[Problem]:
    """Group the problems into chains of `length` questions; `seed` draws which go together and in which order.

    Each problem is in one chain; fewer than `length` that remain are left out, and so are those that can't be asked.

    Returns:
        Problems whose question numbers its parts "Question 1: ..." and whose gold is a JSON list, as the grader
        `chain` reads it. The id names the parts.

    Raises:
        UsageError: `length` is less than 2, or there are fewer problems than one chain needs.
    """
    return [_joined(parts) for parts in grouped(problems, length, seed, "chain")]


def grouped(problems: Sequence[Problem], length: int, seed: int, option: str) -> list[list[Problem]]:
    """The problems that can be asked in groups of `length`; `seed` draws which and in which order.

    Args:
        option: of the workload, that asks for the length.

    Raises:
        UsageError: `length` is less than 2, or there are fewer problems than one group needs.
    """
    if length < 2:
        raise UsageError(f"workload.{option}={length}: must be 2 or more, or null for one question a prompt")
    asked = [problem for problem in problems if problem.error is None]
    if len(asked) < length:
        raise UsageError(
            f"workload.{option}={length}: the workload has {len(asked)} questions; it must be at most that"
        )
    Random(seed).shuffle(asked)
    return [asked[begin : begin + length] for begin in range(0, len(asked) - length + 1, length)]


def _joined(parts: Sequence[Problem]) -> Problem:
    return Problem(
        id="+".join(part.id for part in parts),
        question="\n\n".join(f"Question {place}: {part.question}" for place, part in enumerate(parts, 1)),
        gold=json.dumps([part.gold for part in parts]),
    )
