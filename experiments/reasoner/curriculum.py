"""What the reasoner learns from: problems of all families, on ranges wider than those it is evaluated on."""

from __future__ import annotations

from random import Random

from experiments.workloads import chained_arithmetic, fragility, program_trace
from experiments.workloads.problem import Problem
from experiments.workloads.splits import TRAIN, split_of

FULL_SIZE_AT = 0.35
"""Share of the training after which problems have their full size."""


def training_problem(random: Random, progress: float) -> Problem:
    """One problem of the training split.

    Args:
        progress: share of the training that is done, in [0, 1); problems grow with it.
    """
    size = min(1.0, 0.1 + progress / FULL_SIZE_AT)
    while True:
        family = random.random()
        if family < 0.45:
            problem = _chained_arithmetic(random, size)
        elif family < 0.85:
            problem = _program_trace(random, size)
        else:
            problem = fragility.build(
                random, random.choice(fragility.KINDS), round(128 * 2 ** random.uniform(0, 6 * size))
            )
        if split_of(problem) == TRAIN:
            return problem


def _chained_arithmetic(random: Random, size: float) -> Problem:
    longest = 96 if random.random() < 0.1 else 56
    steps = random.randint(8, 8 + round(size * (longest - 8)))
    dead_ends = random.choice((0.0, 0.0, 0.0, 0.2, 0.5))
    while True:
        far = random.randint(1, steps - 3)
        near = random.randint(1, far)
        distance = (near * chained_arithmetic.LINE_TOKENS, far * chained_arithmetic.LINE_TOKENS)
        recalls, restatements, distractors = random.randint(0, 8), random.randint(0, 3), random.randint(0, 4)
        options = (steps, recalls, distance, random.random(), restatements, distractors, dead_ends)
        try:
            chained_arithmetic.check(*options)
            return chained_arithmetic.build(random, *options)
        except ValueError:  # too much for so few steps: draw again
            continue


def _program_trace(random: Random, size: float) -> Problem:
    statements = random.randint(1, 8)
    most = max(1, round(size * 56 / statements))
    return program_trace.build(
        random, random.randint(1, 5), statements, random.randint(1, min(most, 24)), random.choice((0.0, 0.3, 0.5)), 0.5
    )
