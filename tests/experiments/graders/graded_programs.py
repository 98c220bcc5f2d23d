"""Grades programs in a sandbox of small limits, where this machine has one."""

from __future__ import annotations

import json

import pytest

from experiments.graders import code, grade
from experiments.sandbox import Limits, Sandbox

REFUSED = Sandbox().check()
needs_namespaces = pytest.mark.skipif(REFUSED is not None, reason=f"no sandbox here: {REFUSED}")

ADD = json.dumps(
    {
        "setup": "from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    '''The sum.'''\n",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-5, 5) == 0\n",
    }
)
DOUBLE = json.dumps({"tests": [["2\n", "4\n"], ["21\n", "42\n"]]})


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(code, "SANDBOX", sandbox(seconds=5))


def sandbox(seconds: float) -> Sandbox:
    return Sandbox(Limits(seconds, 4 * seconds, memory=256 << 20, processes=8, file_size=1 << 20, disk=4 << 20))


def score(answer: str, gold: str) -> float | None:
    graded = grade(code.grade_code, answer, gold)
    assert graded.error is None, graded
    return graded.score
