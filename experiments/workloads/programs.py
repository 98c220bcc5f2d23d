"""Small Python programs as text, and the traces of their runs.

The text of a program is Python once the letter that labels a line is taken off:

    a=417
    b=203
    A q=(a*7)%1000
    B for i in range(100,104):
    C  a=(a+b)%1000
    D  if b%2: b=(b-317)%1000
    E print((a+q)%1000)

Its trace takes the lines in the order of the run, each with the values that it needs:

    a:417 b:203
    A q=(a*7)%1000 a:417 417*7=919 q:919
    B i:100 a:417 b:203
    C  a=(a+b)%1000 a:417 b:203 417+203=620 a:620
    D  if b%2: b=(b-317)%1000 b:203 odd b:203 203-317=886 b:886
    ...
    B end
    E print((a+q)%1000) a:... q:919 ...=...
    Answer: ...

All values are from 000 to 999; the loop counts from 100, so that every number has three digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

LETTERS = "abcdefghjklmnopqrstuvwxyz"  # without i, which counts
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

State = dict[str, int]


@dataclass(frozen=True)
class Statement:
    """`target=(left op right)%1000`, perhaps under an `if`.

    Attributes:
        right: a name, or a number as text.
        condition: None, "a%2" or "a<b".
    """

    target: str
    left: str
    op: str
    right: str
    condition: str | None = None

    def __str__(self) -> str:
        text = f"{self.target}=({self.left}{self.op}{self.right})%1000"
        return text if self.condition is None else f"if {self.condition}: {text}"

    def run(self, state: State) -> str:
        """Change the state. Returns what the trace says behind the statement."""
        before = ""
        if self.condition is not None:
            before, holds = _test(self.condition, state)
            if not holds:
                return before
        work, state[self.target] = calculate(self.left, self.op, self.right, state)
        return f"{before}{work} {self.target}:{state[self.target]:03d}"


def calculate(left: str, op: str, right: str, state: State) -> tuple[str, int]:
    """` a:417 b:203 417+203=620` and its value."""
    a = state[left]
    shown = f" {left}:{a:03d}"
    if right.isdigit():
        b, digits = int(right), right
    else:
        b = state[right]
        digits = f"{b:03d}"
        shown += f" {right}:{digits}"
    value = (a + b if op == "+" else a - b if op == "-" else a * b) % 1000
    return f"{shown} {a:03d}{op}{digits}={value:03d}", value


def _test(condition: str, state: State) -> tuple[str, bool]:
    left, less, right = condition.partition("<")
    if not less:
        left = condition[0]
        odd = state[left] % 2 == 1
        return f" {left}:{state[left]:03d} {'odd' if odd else 'even'}", odd
    holds = state[left] < state[right]
    return f" {left}:{state[left]:03d} {right}:{state[right]:03d} {'yes' if holds else 'no'}", holds


@dataclass(frozen=True)
class Program:
    """Values to start from, statements, a loop, and one print.

    Attributes:
        start: names with their first values.
        prelude: runs once, before the loop.
        body: runs `iterations` times; the trace shows `shown` at the beginning of each.
        shown: names.
        result: (left, op, right) of what is printed, or a single name as (name,).
    """

    start: tuple[tuple[str, int], ...]
    prelude: tuple[Statement, ...]
    body: tuple[Statement, ...]
    iterations: int
    shown: tuple[str, ...]
    result: tuple[str, ...]

    @property
    def text(self) -> str:
        """The program with its labels."""
        lines = [f"{name}={value}" for name, value in self.start]
        labels = iter(LABELS)
        lines += [f"{next(labels)} {statement}" for statement in self.prelude]
        if self.body:
            lines.append(f"{next(labels)} for i in range(100,{100 + self.iterations}):")
            lines += [f"{next(labels)}  {statement}" for statement in self.body]
        return "\n".join([*lines, f"{next(labels)} print({self._printed})"])

    @property
    def _printed(self) -> str:
        return self.result[0] if len(self.result) == 1 else f"({''.join(self.result)})%1000"

    def trace(self, known: State | None = None) -> Trace:
        """Run it.

        Args:
            known: values from before this program.
        """
        state = dict(self.start)
        lines = [" ".join(f"{name}:{value:03d}" for name, value in state.items())] if state else []
        state |= known or {}
        labels = iter(LABELS)
        for statement in self.prelude:
            lines.append(f"{next(labels)} {statement}{statement.run(state)}")
        iterations = []
        if self.body:
            head = next(labels)
            body = [(f"{next(labels)}  {statement}", statement) for statement in self.body]
            for i in range(100, 100 + self.iterations):
                iterations.append(len(lines))
                lines.append(f"{head} i:{i} " + " ".join(f"{name}:{state[name]:03d}" for name in self.shown))
                lines += [text + statement.run(state) for text, statement in body]
            lines.append(f"{head} end")
        last = f"{next(labels)} print({self._printed})"
        if len(self.result) == 1:
            value = state[self.result[0]]
            lines.append(f"{last} {self.result[0]}:{value:03d}")
        else:
            work, value = calculate(*self.result, state)
            lines.append(last + work)
        return Trace(lines, iterations, f"{value:03d}", state)


@dataclass(frozen=True)
class Trace:
    """A run of a program.

    Attributes:
        lines: of the trace, the print last.
        iterations: the indices of the lines that begin an iteration.
        answer: what is printed, as three digits.
        state: the values at the end.
    """

    lines: list[str]
    iterations: list[int]
    answer: str
    state: State

    def begins(self, index: int) -> int:
        """Where a line begins, in characters of the lines joined by line ends."""
        return sum(len(line) + 1 for line in self.lines[:index])


def draw_statement(
    random: Random, target: str, names: Sequence[str], conditional: float = 0.0, comparisons: float = 0.5
) -> Statement:
    """One that changes `target`, from its own value or that of another name.

    Args:
        conditional: probability that it stands under an `if`.
        comparisons: probability that an `if` compares two names, where there are two; else it asks whether one is odd.
    """
    condition = None
    if conditional and random.random() < conditional:
        left = random.choice(names)
        others = [name for name in names if name != left]
        condition = f"{left}<{random.choice(others)}" if others and random.random() < comparisons else f"{left}%2"
    kind = random.random()
    left = target if random.random() < 0.7 else random.choice(names)
    if kind < 0.4:
        return Statement(target, left, random.choice("+-"), str(random.randrange(100, 1000)), condition)
    if kind < 0.8:
        right = random.choice([name for name in names if name != left] or [str(random.randrange(100, 1000))])
        return Statement(target, left, random.choice("+-"), right, condition)
    # Factors of 2 or 5 would lead a value that is multiplied again and again to 0.
    return Statement(target, left, "*", str(random.choice((3, 7, 9))), condition)


def draw_start(random: Random, names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    return tuple((name, random.randrange(100, 1000)) for name in names)
