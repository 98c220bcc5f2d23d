"""Programs: a model's program is run against tests, in the sandbox of `experiments.sandbox`."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import time
from decimal import Decimal, InvalidOperation
from typing import Any

from experiments.sandbox import HERE, Limits, Sandbox

SANDBOX = Sandbox(Limits())
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
FENCED = re.compile(r"^[ \t]*```([^\n]*)\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"\s*(?:python|py)\d*\b", re.IGNORECASE)
NOT_PLAIN = 3
"""Exit code of `experiments/sandbox/examiner.py`."""


def grade_code(answer: str, gold: str) -> tuple[float, str | None]:
    """1.0 where the program in the answer passes every test, else 0.0. The first failure ends the tests.

    The program is the last fenced code block that says Python, else the last at all, else the whole answer; it is run
    behind the gold's `setup`, so that it may also be the rest of a function that `setup` begins. The gold is JSON, in
    one of two forms:

    * `{"setup": ..., "tests": [[stdin, stdout], ...]}`: a process for each test. Its output must equal the expected one
      line by line, except space at the ends of lines and the way in which numbers are written, and its exit code be 0.
      The expected output never enters the sandbox.
    * `{"setup": ..., "entry_point": NAME, "test": SOURCE}`: SOURCE defines `check(candidate)`, which raises where the
      function NAME (or the method NAME of `Solution`) is wrong. Test and program run in two sandboxes and exchange
      plain values alone, so a program passes only by the values it returns, and by what it does to its arguments.

    Each test, or call of the function, has `Limits.seconds`, all together have `Limits.suite_seconds`. A program that
    is cut off by a wall-time limit on a busy machine scores 0 as one that never ends does.

    Raises:
        ValueError: the gold is in neither form, or its test and the program exchange what is not a plain value, such as
            a function or an object of a class of their own.
        SandboxError: nothing can be run here.
    """
    exam = json.loads(gold)
    if not isinstance(exam, dict) or not ("tests" in exam or {"entry_point", "test"} <= exam.keys()):
        raise ValueError("the gold holds no tests")
    program = extract_program(answer)
    if not program.strip():
        return 0.0, None
    files = {name: (HERE / name).read_text() for name in ("program.py", "plain.py")}
    files |= {"setup.txt": exam.get("setup", ""), "program.txt": program}
    passed = _passes_calls(files, exam) if "test" in exam else _passes_tests(files, exam["tests"])
    return float(passed), program


def extract_program(answer: str) -> str:
    """The last fenced code block, closed or not, of those that say Python where one does; else the whole answer."""
    blocks = FENCED.findall(answer)
    python = [block for tag, block in blocks if PYTHON.match(tag)]
    return (python or [block for _, block in blocks] or [answer])[-1].strip("\r\n")


def _passes_tests(files: dict[str, str], tests: list[list[str]]) -> bool:
    files = files | {"main.py": (HERE / "script.py").read_text()}
    end = time.monotonic() + SANDBOX.limits.suite_seconds
    for stdin, expected in tests:
        seconds = min(SANDBOX.limits.seconds, end - time.monotonic())
        if seconds <= 0 or not _prints(files, stdin, expected, seconds):
            return False
    return True


def _prints(files: dict[str, str], stdin: str, expected: str, seconds: float) -> bool:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
        given.write(stdin.encode())
        given.seek(0)
        with SANDBOX.start(files, given, output, seconds) as program:
            ended_well = program.wait() == 0
        output.seek(0)
        return ended_well and same_output(output.read().decode(errors="replace"), expected)


def _passes_calls(files: dict[str, str], exam: dict[str, Any]) -> bool:
    limits = SANDBOX.limits
    asked = {"entry_point": exam["entry_point"]}
    asking = {"setup": exam.get("setup", ""), "test": exam["test"], "seconds": limits.seconds} | asked
    ours, theirs = socket.socketpair()
    with ours, theirs:
        candidate = files | {"main.py": (HERE / "candidate.py").read_text(), "exam.json": json.dumps(asked)}
        examiner = {"main.py": (HERE / "examiner.py").read_text(), "plain.py": files["plain.py"]}
        examiner |= {"exam.json": json.dumps(asking)}
        with (
            SANDBOX.start(candidate, ours, seconds=limits.suite_seconds) as program,
            SANDBOX.start(examiner, theirs, seconds=limits.suite_seconds) as test,
        ):
            ours.close()
            theirs.close()
            code = test.wait()
            program.require_started()
            if code == NOT_PLAIN:
                raise ValueError("test and program exchange what is not a plain value, which can't be graded here")
            return code == 0


def same_output(output: str, expected: str) -> bool:
    """Whether two texts are the same lines of the same words, where 1.50 and 1.5 are the same word."""
    lines, wanted = ([line.split() for line in text.strip().splitlines()] for text in (output, expected))
    return [len(line) for line in lines] == [len(line) for line in wanted] and all(
        word == other or _number(word) == _number(other) is not None
        for line, line_wanted in zip(lines, wanted, strict=True)
        for word, other in zip(line, line_wanted, strict=True)
    )


def _number(word: str) -> Decimal | None:
    """Its value, where the word is a number as programs print them; `Decimal` reads 4_1 and Arabic digits too."""
    if not NUMBER.fullmatch(word):
        return None
    try:
        return Decimal(word)
    except InvalidOperation:  # an exponent beyond what it holds
        return None
