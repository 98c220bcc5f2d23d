"""Runs the programs of generated problems as Python, and checks traces against what happened."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class Execution:
    """What a program did.

    Attributes:
        printed: the number.
        iterations: the loop's counter with the variables at the beginning of each iteration.
        steps: (label, variables before, variables after) of each labelled line that ran, in order.
    """

    printed: int
    iterations: list[tuple[int, dict[str, int]]]
    steps: list[tuple[str, dict[str, int], dict[str, int]]]


def run_python(program: str, known: dict[str, int] | None = None) -> Execution:
    """Run a program without its labels, watched line by line.

    Args:
        known: variables from before.
    """
    lines = program.splitlines()
    labels = [line[0] if line[1] == " " else "" for line in lines]
    code = "\n".join(line[2:] if label else line for label, line in zip(labels, lines))
    printed: list[int] = []
    iterations: list[tuple[int, dict[str, int]]] = []
    steps: list[tuple[str, dict[str, int], dict[str, int]]] = []

    def state() -> dict[str, int]:
        return {name: value for name, value in names.items() if name.islower() and name != "i" and len(name) == 1}

    # Every line reports before and after itself; the loop's body keeps its indentation.
    watched = []
    for number, line in enumerate(code.splitlines()):
        indent = line[: len(line) - len(line.lstrip())]
        if line.startswith("for "):
            watched += [line, " enter(i)"]
        else:
            watched += [f"{indent}before({number})", line, f"{indent}after({number})"]

    def after(number: int) -> None:
        if labels[number]:
            steps.append((labels[number], begun[number], state()))

    begun: dict[int, dict[str, int]] = {}
    names = dict(known or {}) | {
        "before": lambda number: begun.__setitem__(number, state()),
        "after": after,
        "enter": lambda i: iterations.append((i, state())),
        "print": printed.append,
        "range": range,
        "__builtins__": {},
    }
    exec(compile(code, "program", "exec"), dict(known or {}) | {"print": printed.append})
    exec(compile("\n".join(watched), "watched", "exec"), names)
    assert printed[0] == printed[1], "watching changed the program"
    return Execution(printed[0], iterations, steps)


def check_trace(program: str, solution: str, known: dict[str, int] | None = None) -> None:
    """Every line of the trace is the next that Python ran, and every value in it is the one that Python had.

    The last line, the answer, is left to the caller.
    """
    execution = run_python(program, known)
    source = {line[0]: line for line in program.splitlines() if line[1] == " "}
    lines = solution.splitlines()[:-1]
    start = [line for line in program.splitlines() if line[1] == "="]
    if start:
        expected = " ".join(f"{name}:{value}" for name, value in (line.split("=") for line in start))
        assert lines.pop(0) == expected
    steps, iterations = iter(execution.steps), iter(execution.iterations)
    for line in lines:
        if re.fullmatch(r"[A-Z] end", line):
            assert next(iterations, None) is None
        elif entered := re.match(r"[A-Z] i:(\d+) ", line):
            i, state = next(iterations)
            assert int(entered[1]) == i
            shown = dict(word.split(":") for word in line.split(" ")[2:])
            assert shown == {name: f"{state[name]:03d}" for name in shown}, line
            assert shown
        else:
            label, before, after = next(steps)
            assert line.startswith(source[label]), line
            _check_statement(source[label], line[len(source[label]) :].split(" ")[1:], before, after)
    assert next(steps, None) is None
    assert next(iterations, None) is None


def _check_statement(source: str, work: list[str], before: dict[str, int], after: dict[str, int]) -> None:
    """What the trace says behind a statement, word by word."""
    condition = re.search(r"if (\w)(%2|<(\w)):", source)
    if condition is not None:
        left, right = before[condition[1]], condition[3]
        holds = left % 2 == 1 if right is None else left < before[right]
        shown = [f"{name}:{before[name]:03d}" for name in (condition[1], right) if name]
        verdict = ("odd" if holds else "even") if right is None else ("yes" if holds else "no")
        assert work[: len(shown) + 1] == [*shown, verdict], source
        work = work[len(shown) + 1 :]
        if not holds:
            assert work == []
            assert after == before
            return
    target = re.search(r"(\w)=\(", source)
    calculated = re.search(r"\((\w)([-+*])(\w+)\)%1000", source)
    if calculated is None:
        name = re.search(r"print\((\w)\)", source)[1]
        assert work == [f"{name}:{before[name]:03d}"]
        return
    left, operation, right = calculated.groups()
    numbers = [f"{before[name]:03d}" if name in before else name for name in (left, right)]
    shown = [f"{name}:{before[name]:03d}" for name in (left, right) if name in before]
    *operands, equation = work[:-1] if target else work
    assert operands == shown, source
    value = eval(f"({int(numbers[0])}{operation}{int(numbers[1])})%1000")
    assert equation == f"{numbers[0]}{operation}{numbers[1]}={value:03d}", source
    if target:
        assert after == before | {target[1]: value}
        assert work[-1] == f"{target[1]}:{value:03d}"
