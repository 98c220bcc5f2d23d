"""Problems that break when one thing is forgotten, each in a thought of a chosen length (`programs` has the grammar).

* `fact`: a value is computed before a long loop and needed once behind it.
* `instructions`: two instructions at the top say how to give the answer at the end of the loop.
* `turn`: an earlier turn computed the value, and a second question, about a long loop, needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from experiments.workloads.lengths import WORDS
from experiments.workloads.problem import Fact, Problem
from experiments.workloads.programs import LETTERS, Program, Statement, draw_start, draw_statement
from experiments.workloads.splits import HELD_OUT, draw

KINDS = ("fact", "instructions", "turn")
MANNERS = ("backwards", "twice", "plainly")
ITERATION_TOKENS = 56
"""About what one iteration of a loop with one statement takes in the trace."""


def generate(
    seed: int,
    count: int = 36,
    kinds: Sequence[str] = KINDS,
    distances: Sequence[int] = (512, 1024, 2048),
    manners: Sequence[str] = ("twice", "plainly"),
    split: str = HELD_OUT,
) -> Iterator[Problem]:
    """Problems of all kinds at all distances, in turn.

    Args:
        seed: of the programs.
        count: problems.
        kinds: "fact", "instructions", "turn".
        distances: tokens of the loop's trace, each 128 to 8,192.
        manners: how instructions want the answer: "plainly", "twice", "backwards".
        split: "held_out" or "train".

    Raises:
        ValueError: an option is out of range.
    """
    for name, chosen, known in (("kinds", kinds, KINDS), ("manners", manners, MANNERS)):
        for choice in chosen:
            if choice not in known:
                raise ValueError(f"{name}={list(chosen)}: {choice} must be one of {', '.join(known)}")
        if not chosen:
            raise ValueError(f"{name}=[]: give at least one of {', '.join(known)}")
    for distance in distances:
        if not 128 <= distance <= 8192:
            raise ValueError(f"distances={list(distances)}: {distance} must be from 128 to 8192")
    if not distances:
        raise ValueError("distances=[]: give at least one")

    def problem(random: Random, number: int) -> Problem:
        return build(random, kinds[number % len(kinds)], distances[number // len(kinds) % len(distances)], manners)

    return draw(count, split, seed, problem)


def build(random: Random, kind: str, distance: int, manners: Sequence[str] = MANNERS) -> Problem:
    """One problem; its id is empty."""
    iterations = max(1, round(distance / ITERATION_TOKENS))
    loop, fact = random.sample(LETTERS, 2)
    start, body = draw_start(random, [loop]), (draw_statement(random, loop, [loop]),)
    computed = Statement(fact, loop, "*", str(random.randrange(2, 10)))
    combined = (loop, random.choice("+-"), fact)
    difficulty = f"{kind} at {distance}"
    if kind == "instructions":
        return _instructions(random, Program(start, (), body, iterations, (loop,), (loop,)), manners, difficulty)
    if kind == "fact":
        program = Program(start, (computed,), body, iterations, (loop,), combined)
        question, trace = program.text, program.trace()
        history: tuple[tuple[str, str], ...] = ()
        stated = len(question) + trace.begins(2) - 4
        value = trace.state[fact]
    else:
        other = random.choice([name for name in LETTERS if name not in (loop, fact)])
        first = Program(
            draw_start(random, [other]),
            (Statement(fact, other, "+", str(random.randrange(100, 1000))),),
            (),
            0,
            (),
            (fact,),
        )
        before = first.trace()
        value = before.state[fact]
        history = ((first.text, _solution(before.lines, before.answer)),)
        program = Program(start, (), body, iterations, (loop,), combined)
        question, trace = program.text, program.trace({fact: value})
        stated = -len(f"\nAnswer: {before.answer}") - 3
    last = trace.lines[-1]
    text = f"{fact}:{value:03d}"
    needed = len(question) + trace.begins(len(trace.lines) - 1) + last.index(f" {text} ") + 3
    facts = (Fact(last[: last.index(" ", 2)], text, stated, needed),)
    return Problem(
        "", question, trace.answer, kind, history, solution=_solution(trace.lines, trace.answer), difficulty=difficulty,
        facts=facts,
    )  # fmt: skip


def _instructions(random: Random, program: Program, manners: Sequence[str], difficulty: str) -> Problem:
    word = random.choice(WORDS)
    manner = random.choice(manners)
    before = f"Before the answer write {word}."
    question = f"{before}\nWrite the answer {manner}.\n{program.text}"
    trace = program.trace()
    answer = {"backwards": trace.answer[::-1], "twice": trace.answer * 2, "plainly": trace.answer}[manner]
    solution = _solution(trace.lines, f"{word} {answer}")
    end = len(question) + len(solution)
    facts = (
        Fact("Answer: ", word, len(before) - len(word) - 1, end - len(f"{word} {answer}")),
        Fact("Answer: ", answer, len(before) + 1 + len("Write the answer "), end - len(answer)),
    )
    return Problem(
        "", question, f"{word} {answer}", "instructions", solution=solution, difficulty=difficulty, facts=facts
    )


def _solution(lines: Sequence[str], answer: str) -> str:
    return "\n".join([*lines, f"Answer: {answer}"])
