"""Facts of a problem in the record of a run and in its numbers."""

from __future__ import annotations

import pytest

from experiments.analysis.metrics import summarise
from experiments.graders import get_grader
from experiments.records.schemas import REQUEST_SCHEMA, write_rows
from experiments.running.outcomes import request_rows
from experiments.running.prompts import Prompt
from experiments.workloads.problem import Fact, Problem
from zipage import CompletionOutput, RequestMetrics, RequestOutput

FACTS = (Fact("b=", "m:620", 10, 110), Fact("Answer: ", "butter", 5, 205))
PROBLEM = Problem(
    "0", "q", "butter 1", kind="k", solution="b=a-m m:620\nAnswer: butter 1", difficulty="hard", facts=FACTS
)
PROMPT = Prompt("<q>", [1, 2, 3])


def rows_of(*answers: str, problem: Problem = PROBLEM, error: str | None = None) -> list[dict]:
    samples = [
        CompletionOutput(index=index, text=text, token_ids=[1], finish_reason="stop", metrics=RequestMetrics())
        for index, text in enumerate(answers)
    ]
    output = RequestOutput("0", None, [1, 2, 3], samples, error=error)
    return request_rows(problem, PROMPT, output, len(answers), get_grader("final"), 0.0)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("m:620", True),
        ("b=a-m a:1 m:620 1-620=381 b:381", True),
        ("b=a-m m:620", True),
        ("x\nb=a-m m:620 \ny", True),
        ("b=a-m m:6201", False),
        ("b=a-m xm:620", False),
        ("b=a-m m:62", False),
        ("c=a-m m:620", False),
        (" b=a-m m:620", False),
        ("b=a-m\nm:620", False),
        ("", False),
    ],
)
def test_known(text, known):
    assert Fact("" if text == "m:620" else "b=", "m:620", 0, 9).known(text) == known


def test_rows_say_what_was_known():
    right, half, none = rows_of(PROBLEM.solution, "b=a-m m:620\nAnswer: island 1", "b=a-m m:621")
    assert [row["facts_known"] for row in (right, half, none)] == [[True, True], [True, False], [False, False]]
    assert [row["grade"] for row in (right, half, none)] == [1, 0, 0]
    assert right["fact_distances"] == [100, 200]
    assert right["difficulty"] == "hard"
    assert right["expected_tokens"] == len(PROBLEM.solution)


def test_a_refused_prompt_knows_nothing():
    (row,) = rows_of("", error="too long")
    assert row["facts_known"] == [False, False]
    assert row["fact_distances"] == [100, 200]


def test_problems_without_facts_have_none(tmp_path):
    import pyarrow.parquet as pq

    (plain,) = rows_of("Answer: 1", problem=Problem("0", "q", "1"))
    assert "facts_known" not in plain
    assert "fact_distances" not in plain
    write_rows(tmp_path / "rows.parquet", [plain, *rows_of(PROBLEM.solution)], REQUEST_SCHEMA)
    read = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["facts_known"] for row in read] == [None, [True, True]]
    assert [row["fact_distances"] for row in read] == [None, [100, 200]]
    assert [row["expected_tokens"] for row in read] == [None, len(PROBLEM.solution)]


def test_share_of_known_facts():
    def share(rows):
        return summarise(rows, [], [], seconds=1.0, evicts=False)["facts_known"]

    rows = rows_of(PROBLEM.solution, "b=a-m m:620", "b=a-m m:621")
    assert share(rows) == pytest.approx(3 / 6)
    assert share(rows_of("x", problem=Problem("0", "q", "1"))) is None
    assert share([*rows, *rows_of("", error="too long")]) == pytest.approx(3 / 8)
