"""Tests of programs, as data sets hold them, in the one form that the grader `code` reads."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from experiments.config.schema import WorkloadConfig
from experiments.errors import UsageError

logger = logging.getLogger(__name__)

PRIVATE_BYTES = 1 << 30
"""Bytes of the hidden tests of one problem, decompressed; more are refused."""

TEST_BYTES = 256 << 10
"""Bytes of the tests of one problem: the gold stands in every row of a record, so tests beyond it are left out."""

COMMON_IMPORTS = """\
from typing import *
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from builtins import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
sys.setrecursionlimit(50_000)
"""
"""What programs on contest sites may take for granted; LiveCodeBench puts much the same before each.

Of equal names the last counts: a module over a function in it (bisect), a built-in function over that of `math` (pow),
a class over its type (Counter).
"""

CALLS = """\
import json

def check(candidate):
    for arguments, expected in json.loads({tests!r}):
        returned = candidate(*arguments)
        if isinstance(returned, tuple):
            returned = list(returned)
        assert returned == expected
"""


UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, EOFError, OverflowError, RecursionError, MemoryError)
"""What reading a damaged text may raise."""


def exam(row: Mapping[str, Any], number: int, config: WorkloadConfig) -> str:
    """The gold of an item with tests: JSON as `experiments.graders.code.grade_code` wants it.

    `workload.tests` names the fields that are read:

    * `humaneval`: prompt, test (defines `check(candidate)`), entry_point;
    * `livecodebench`: public_test_cases, private_test_cases, metadata;
    * `pairs`: tests, a list of [stdin, stdout].

    Raises:
        UsageError: the item does not hold them.
    """
    if config.tests not in FORMATS:
        raise UsageError(f"workload.tests={config.tests}: must be one of {', '.join(FORMATS)}, or null")
    try:
        return json.dumps(FORMATS[config.tests](row, number))
    except KeyError as error:
        raise UsageError(
            f"workload.tests={config.tests}: item {number} has no field {error}; it has {', '.join(row)}"
        ) from error
    except (*UNREADABLE, zlib.error, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"workload.tests={config.tests}: the tests of item {number} can't be read ({reason})"
        ) from error


def _humaneval(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    exam = {"setup": row["prompt"], "entry_point": row["entry_point"], "test": row["test"]}
    if None in exam.values():
        raise ValueError("a field is null")
    return exam


def _pairs(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    tests = [[given, expected] for given, expected in row["tests"]]
    if any(None in test for test in tests):
        raise ValueError("an input or output is null")
    return {"setup": "", "tests": _bounded([[str(given), str(expected)] for given, expected in tests], number)}


def _livecodebench(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    cases = json.loads(row["public_test_cases"]) + _private(row["private_test_cases"])
    tests = _bounded([[case["input"], case["output"]] for case in cases], number)
    name = json.loads(row["metadata"] or "{}").get("func_name")
    if name is None:
        return {"setup": COMMON_IMPORTS, "tests": tests}
    calls = [[[json.loads(line) for line in given.splitlines()], json.loads(expected)] for given, expected in tests]
    return {"setup": COMMON_IMPORTS, "entry_point": name, "test": CALLS.format(tests=json.dumps(calls))}


def _private(text: str) -> list[dict[str, str]]:
    """The hidden cases: JSON, or JSON that was pickled, compressed and written in base 64."""
    try:
        return json.loads(text)
    except ValueError:
        stream = zlib.decompressobj()
        packed = stream.decompress(base64.b64decode(text), PRIVATE_BYTES)
        if stream.unconsumed_tail:
            raise ValueError(f"more than {PRIVATE_BYTES} bytes") from None
        return json.loads(TextUnpickler(io.BytesIO(packed)).load())


class TextUnpickler(pickle.Unpickler):
    """Reads what is pickled without a name of any class or function, which a text is. It can't run or change anything.

    Raises:
        pickle.UnpicklingError: there is a name.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not text")


def _bounded(tests: list[list[str]], number: int) -> list[list[str]]:
    """The tests in order, the largest left out where all together exceed `TEST_BYTES`; the smallest always stays."""
    if not tests:
        raise ValueError("there is none")
    by_size = sorted(range(len(tests)), key=lambda index: sum(map(len, tests[index])))
    kept, size = {by_size[0]}, 0
    for index in by_size:
        size += sum(map(len, tests[index]))
        if size <= TEST_BYTES:
            kept.add(index)
    if len(kept) < len(tests):
        logger.warning("item %d: %d of %d tests left out, too large", number, len(tests) - len(kept), len(tests))
    return [test for index, test in enumerate(tests) if index in kept]


FORMATS: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "humaneval": _humaneval,
    "livecodebench": _livecodebench,
    "pairs": _pairs,
}
