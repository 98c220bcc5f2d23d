"""Arithmetic word problems, generated from a seed: every answer is a positive integer that one or two steps reach."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from experiments.workloads.problem import Problem
from experiments.workloads.word_problems import one_step, two_steps
from experiments.workloads.word_problems.draw import Draw, Kind

KINDS: dict[str, tuple[int, Kind]] = {
    kind.__name__: (steps, kind) for steps, kinds in ((1, one_step.KINDS), (2, two_steps.KINDS)) for kind in kinds
}
"""Name of a kind -> its number of steps, its function."""


def generate(seed: int, count: int = 256, steps: Sequence[int] = (1, 2)) -> list[Problem]:
    """Problems that differ from each other; every kind comes once before any comes again.

    The first problems do not depend on `count`: a smaller set is a prefix of a larger one.

    Args:
        seed: decides everything.
        count: how many.
        steps: numbers of arithmetic steps that are wanted.

    Raises:
        ValueError: no kind has the wanted number of steps, or there are not `count` different problems.
    """
    names = [name for name, (n, _) in KINDS.items() if n in steps]
    if not names or count < 1:
        raise ValueError(f"count={count}, steps={list(steps)}: count must be at least 1, steps of 1 or 2")
    seen: set[str] = set()
    problems = []
    for number in range(count):
        turn, place = divmod(number, len(names))
        name = Random(f"{seed}/order/{turn}").sample(names, len(names))[place]
        question, answer = _new(KINDS[name][1], f"{seed}/{number}", seen)
        seen.add(question)
        problems.append(Problem(id=f"{number:05d}", question=question, gold=str(answer), kind=name))
    return problems


def _new(function: Kind, dice: str, seen: set[str]) -> tuple[str, int]:
    for attempt in range(1000):
        question, answer = function(Draw(Random(f"{dice}/{attempt}")))
        if question not in seen:
            return question, answer
    raise ValueError(f"{function.__name__} has no more new questions after {len(seen)} problems: lower count")
