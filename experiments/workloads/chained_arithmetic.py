"""AIME-style problems: a chain of arithmetic modulo 1000 over named quantities, with an answer from 000 to 999.

Every line of the question defines the next name, from the one before or from one far back:

    k=417          a start
    l=k+238        one step on: also k-238 and k*7
    m=l*4          the same, as a side quantity: the chain goes on from l
    n=@m           states m again
    o=l-m          needs m, however far back
    p=o+117|o+204  the first of these that is even, else the last: those tried before are dead ends
    Find p.

The solution takes line by line, each with the values that it needs, so that thought is local except for the few side
quantities: `o=l-m l:655 m:620 655-620=035 o:035`. A side quantity that is stated once and needed far behind must
survive in the cache until then; that is what these problems measure. One lost fact loses the answer, so facts are few,
their distances are known, and each is graded by itself as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

from experiments.workloads.problem import Fact, Problem
from experiments.workloads.splits import HELD_OUT, draw

NAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZαβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΦΨΩбгджзийлпфцчшщъыьэюя"
"""Each line's name follows that of the line before in this order, from any start, and round its end."""

LINE_TOKENS = 32
"""About what a line takes in the solution: from a distance in tokens to one in lines."""


def generate(
    seed: int,
    count: int = 32,
    steps: int = 36,
    recalls: int = 2,
    distance: Sequence[int] = (100, 600),
    stated_once: float = 0.5,
    restatements: int = 2,
    distractors: int = 1,
    dead_ends: float = 0.0,
    split: str = HELD_OUT,
) -> Iterator[Problem]:
    """Chains of `steps` lines.

    Args:
        seed: of the numbers, names and places.
        count: problems.
        steps: lines of a chain, 8 to 96; a line takes about 32 tokens of thought.
        recalls: side quantities that a later line needs.
        distance: the least and greatest distance between the line that states a side quantity and the one that needs
            it, in tokens of thought; drawn evenly in lines of 32 tokens, which about 95 % of lines reach (with
            dead ends they are longer). Each fact of a problem has its exact distance, from where it was stated last.
        stated_once: share of the recalled quantities that are not stated again in between, in [0, 1].
        restatements: how often each of the others is stated again.
        distractors: side quantities that nothing needs.
        dead_ends: share of the remaining lines that try one to four branches for the first even one, in [0, 1]. One
            of a single branch reads like a step on.
        split: "held_out" or "train".

    Raises:
        ValueError: an option is out of range, or the lines asked for do not fit into `steps`.
    """
    check(steps, recalls, distance, stated_once, restatements, distractors, dead_ends)

    def problem(random: Random, number: int) -> Problem:
        return build(random, steps, recalls, distance, stated_once, restatements, distractors, dead_ends)

    return draw(count, split, seed, problem)


def check(
    steps: int,
    recalls: int,
    distance: Sequence[int],
    stated_once: float,
    restatements: int,
    distractors: int,
    dead_ends: float,
) -> None:
    """Raises ValueError as `generate` does."""
    if not isinstance(steps, int) or not 8 <= steps <= 96:
        raise ValueError(f"steps={steps}: must be a whole number from 8 to 96")
    for name, value in (("recalls", recalls), ("restatements", restatements), ("distractors", distractors)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value}: must be a whole number of at least 0")
    for name, share in (("stated_once", stated_once), ("dead_ends", dead_ends)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: must be from 0 to 1")
    if not isinstance(distance, Sequence) or len(distance) != 2 or not LINE_TOKENS <= distance[0] <= distance[1]:
        raise ValueError(f"distance={distance}: must be two numbers of tokens, {LINE_TOKENS} <= least <= greatest")
    if recalls and distance[1] > (longest := (steps - 3) * LINE_TOKENS):
        raise ValueError(f"distance={list(distance)}: {steps} steps allow at most {longest}; take more steps")
    taken = recalls * 2 + round((1 - stated_once) * recalls) * restatements + distractors
    if taken > steps - 3:
        raise ValueError(
            f"recalls={recalls}, restatements={restatements}, distractors={distractors}: take {taken} lines, and "
            f"steps={steps} leave {steps - 3}; ask for fewer or for more steps"
        )


def build(
    random: Random,
    steps: int,
    recalls: int,
    distance: Sequence[int],
    stated_once: float,
    restatements: int,
    distractors: int,
    dead_ends: float,
) -> Problem:
    """One problem; its id is empty.

    Raises:
        ValueError: the places drawn leave no room for the rest, in 100 tries.
    """
    for _ in range(100):
        roles = _lay_out(random, steps, recalls, distance, stated_once, restatements, distractors)
        if roles is not None:
            break
    else:
        raise ValueError(
            f"distance={list(distance)}: {recalls} such recalls with restatements={restatements} in between do not fit "
            f"into steps={steps}; take more steps, or fewer recalls or fewer restatements"
        )
    return _Chain(random, steps).write(roles, dead_ends, f"{steps} steps, {recalls} recalls")


def _lay_out(random, steps, recalls, distance, stated_once, restatements, distractors) -> list | None:
    """What each line is for: None a step on, ("fact",), ("note", line of the fact), ("recall", line of the fact)."""
    roles: list = [None] * steps
    roles[0] = ("start",)
    once = recalls - round((1 - stated_once) * recalls)
    for number in range(recalls):
        gap = max(1, round(random.uniform(*distance) / LINE_TOKENS))
        places = [i for i in range(1, steps - gap) if roles[i] is None and roles[i + gap] is None]
        if not places:
            return None
        fact = random.choice(places)
        roles[fact], roles[fact + gap] = ("fact",), ("recall", fact)
        if number >= once:
            for k in range(1, restatements + 1):
                free = [i for i in range(fact + 1, fact + gap) if roles[i] is None]
                if not free:
                    return None
                wanted = fact + gap * k / (restatements + 1)
                roles[min(free, key=lambda i: abs(i - wanted))] = ("note", fact)
    free = [i for i in range(1, steps - 1) if roles[i] is None]
    if len(free) < distractors:
        return None
    for i in random.sample(free, distractors):
        roles[i] = ("fact",)
    return roles


def where_lost(problem: Problem, thought: str) -> str | None:
    """What the first wrong character of a thought should have said; None where the whole thought is right.

    Returns:
        "question": the statement of a line, copied from the question. "far fact": a side quantity stated before the
        line above. "near value": the value of the line above. "arithmetic": anything else.
    """
    solution = problem.solution or ""
    if thought.strip() == solution:
        return None
    ends = min(len(solution), len(thought))
    first = next((i for i in range(ends) if solution[i] != thought[i]), ends)
    line = solution[solution.rfind("\n", 0, first) + 1 : first]
    statement, written, rest = line.partition(" ")
    if not written:
        return "question"
    value = re.search(r"(\S):\d{0,2}$", rest)
    if value is None or value[1] == line[0]:  # the line's own value repeats its result
        return "arithmetic"
    return "far fact" if re.search(rf"[@+-]{value[1]}$", statement) else "near value"


class _Chain:
    """The text of one problem as its lines are written."""

    def __init__(self, random: Random, steps: int) -> None:
        self._random = random
        first = random.randrange(len(NAMES))
        self._names = [NAMES[(first + i) % len(NAMES)] for i in range(steps)]
        self._values: dict[str, int] = {}
        self._stated: dict[str, int] = {}
        self._prompt: list[str] = []
        self._thought: list[str] = []
        self._length = 0
        self._recalls: list[tuple[str, str, int, int]] = []
        self._current = ""

    def write(self, roles: list, dead_ends: float, difficulty: str) -> Problem:
        for name, role in zip(self._names, roles, strict=True):
            kind = "step" if role is None else role[0]
            if kind == "start":
                value = self._random.randrange(1000)
                self._line(name, f"{value:03d}", "", value)
            elif kind == "note":
                fact = self._names[role[1]]
                self._note(name, fact)
            elif kind == "recall":
                self._recall(name, self._names[role[1]])
            elif kind == "step" and dead_ends and self._random.random() < dead_ends:
                self._search(name)
            else:
                self._step(name)
            if kind not in ("fact", "note"):
                self._current = name
        question = "\n".join([*self._prompt, f"Find {self._current}."])
        gold = f"{self._values[self._current]:03d}"
        solution = "".join(self._thought) + f"Answer: {gold}"
        facts = tuple(
            Fact(f"{name}=", text, len(question) + stated, len(question) + needed)
            for name, text, stated, needed in self._recalls
        )
        return Problem("", question, gold, "chained_arithmetic", solution=solution, difficulty=difficulty, facts=facts)

    def _line(self, name: str, statement: str, work: str, value: int) -> None:
        self._values[name] = value
        self._prompt.append(f"{name}={statement}")
        line = f"{name}={statement}{work} {name}:{value:03d}\n"
        self._thought.append(line)
        self._length += len(line)
        self._stated[name] = self._length - 4

    def _operation(self, left: str) -> tuple[str, int]:
        """One step on from a name: its sign with its number, and the value."""
        kind, value = self._random.randrange(3), self._values[left]
        if kind == 2:
            factor = self._random.randrange(2, 10)
            return f"*{factor}", value * factor % 1000
        number = self._random.randrange(100, 1000)
        return (f"+{number}", (value + number) % 1000) if kind == 0 else (f"-{number}", (value - number) % 1000)

    def _step(self, name: str) -> None:
        left = self._current
        operation, value = self._operation(left)
        before = f"{self._values[left]:03d}"
        self._line(name, f"{left}{operation}", f" {left}:{before} {before}{operation}={value:03d}", value)

    def _search(self, name: str) -> None:
        left = self._current
        before = f"{self._values[left]:03d}"
        branches, tried = [], ""
        wanted = self._random.randrange(4)
        found: int | None = None
        for number in range(wanted + 1):
            operation, value = self._operation(left)
            while number < wanted and value % 2 == 0:  # a dead end before the branch that is wanted
                operation, value = self._operation(left)
            branches.append(f"{left}{operation}")
            tried += f" {before}{operation}={value:03d} {'odd' if value % 2 else 'even'}"
            found = value
        self._line(name, "|".join(branches), f" {left}:{before}{tried}", found)

    def _note(self, name: str, fact: str) -> None:
        value = self._values[fact]
        self._line(name, f"@{fact}", f" {fact}:{value:03d}", value)
        self._stated[fact] = self._stated[name] - 6

    def _recall(self, name: str, fact: str) -> None:
        left, sign = self._current, self._random.choice("+-")
        a, b = self._values[left], self._values[fact]
        value = (a + b if sign == "+" else a - b) % 1000
        statement = f"{left}{sign}{fact}"
        needed = self._length + len(f"{name}={statement} {left}:{a:03d} {fact}:")
        self._recalls.append((name, f"{fact}:{b:03d}", self._stated[fact], needed))
        self._line(name, statement, f" {left}:{a:03d} {fact}:{b:03d} {a:03d}{sign}{b:03d}={value:03d}", value)
