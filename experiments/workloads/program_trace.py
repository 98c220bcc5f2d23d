"""LiveCodeBench-style problems (its code-execution scenario): what does a small program print?

The solution is a trace of the run (see `programs`). Its state is local: every iteration begins with the values of all
variables. The program must survive, since every line of it is read again in every iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from experiments.workloads.problem import Fact, Problem
from experiments.workloads.programs import LABELS, LETTERS, Program, draw_start, draw_statement
from experiments.workloads.splits import HELD_OUT, draw


def generate(
    seed: int,
    count: int = 32,
    variables: int = 3,
    statements: int = 5,
    iterations: int = 4,
    conditional: float = 0.4,
    comparisons: float = 0.2,
    split: str = HELD_OUT,
) -> Iterator[Problem]:
    """Programs with one loop.

    The values at the beginning of each iteration are facts of the problem, graded by themselves as well.

    Args:
        seed: of the programs.
        count: problems.
        variables: 1 to 8.
        statements: in the loop, 1 to 12; the trace of one takes about 42 tokens.
        iterations: of the loop, 1 to 200.
        conditional: share of the statements that stand under an `if`, in [0, 1].
        comparisons: share of these that compare two variables, in [0, 1]; the others ask whether one is odd.
        split: "held_out" or "train".

    Raises:
        ValueError: an option is out of range.
    """
    for name, value, least, most in (
        ("variables", variables, 1, 8),
        ("statements", statements, 1, 12),
        ("iterations", iterations, 1, 200),
    ):
        if not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name}={value}: must be a whole number from {least} to {most}")
    for name, share in (("conditional", conditional), ("comparisons", comparisons)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: must be from 0 to 1")

    def problem(random: Random, number: int) -> Problem:
        return build(random, variables, statements, iterations, conditional, comparisons)

    return draw(count, split, seed, problem)


def build(
    random: Random, variables: int, statements: int, iterations: int, conditional: float, comparisons: float
) -> Problem:
    """One problem; its id is empty."""
    names = sorted(random.sample(LETTERS, variables))
    # Every variable changes somewhere, as far as there are statements.
    targets = random.sample(names, min(variables, statements))
    targets += random.choices(names, k=statements - len(targets))
    random.shuffle(targets)
    body = tuple(draw_statement(random, target, names, conditional, comparisons) for target in targets)
    program = Program(draw_start(random, names), (), body, iterations, tuple(names), (random.choice(names),))
    question, trace = program.text, program.trace()
    solution = "\n".join([*trace.lines, f"Answer: {trace.answer}"])
    facts, stated = [], len(question)
    for index in trace.iterations:
        head, values = trace.lines[index].split(" ", 2)[1:]
        begins = len(question) + trace.begins(index)
        facts.append(Fact(f"{LABELS[0]} {head} ", values, stated, begins))
        stated = begins
    difficulty = f"{variables} variables, {statements} statements, {iterations} iterations"
    return Problem(
        "", question, trace.answer, "program_trace", solution=solution, difficulty=difficulty, facts=tuple(facts)
    )
