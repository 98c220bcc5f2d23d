"""Which generated problems are for training and which are held out for evaluation.

The question itself decides, by its hash, so the two never share a problem, whatever seeds and options drew them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from experiments.workloads.problem import Problem

HELD_OUT = "held_out"
TRAIN = "train"
SHARE = 8
"""One problem in this many is held out."""


def split_of(problem: Problem) -> str:
    """The split of a problem. Earlier turns count as part of the question."""
    turns = "\0".join(text for turn in problem.history for text in turn)
    return TRAIN if zlib.crc32(f"{turns}\0{problem.question}".encode()) % SHARE else HELD_OUT


def draw(count: int, split: str, seed: int, build: Callable[[Random, int], Problem]) -> Iterator[Problem]:
    """`count` different problems of a split.

    The first problems do not depend on `count`.

    Args:
        build: makes the problem of a number from a random generator of its own.

    Raises:
        ValueError: an option is out of range, or 1,000 draws in a row gave no new problem.
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count={count}: must be a whole number of at least 1")
    if split not in (HELD_OUT, TRAIN):
        raise ValueError(f"split={split}: must be {HELD_OUT} or {TRAIN}")
    seen: set[tuple] = set()
    for number in range(count):
        for attempt in range(1000):
            problem = build(Random(f"{seed}/{number}/{attempt}"), number)
            key = (problem.history, problem.question)
            if split_of(problem) == split and key not in seen:
                break
        else:
            raise ValueError(f"count={count}: there are only {number} different problems of these options")
        seen.add(key)
        yield replace(problem, id=f"{number:05d}")
