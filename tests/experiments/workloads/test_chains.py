"""Chains: several questions in one prompt, each answer graded for itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.config.schema import WorkloadConfig
from experiments.errors import UsageError
from experiments.graders import GRADERS, get_grader, grade
from experiments.graders.chain import split_answers
from experiments.workloads import load_problems


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(10)]
    rows[4]["answer"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return WorkloadConfig(name="numbers", path=str(path), grader="chain", chain=4)


def test_each_question_that_can_be_asked_is_in_one_chain(questions):
    problems = load_problems(questions)
    assert len(problems) == 2, "nine questions are two chains of four"
    places = [place for problem in problems for place in problem.id.split("+")]
    assert len(set(places)) == 8
    assert "4" not in places
    for problem in problems:
        golds = json.loads(problem.gold)
        assert golds == problem.id.split("+")
        assert problem.question.split("\n\n") == [f"Question {i}: What is {n}?" for i, n in enumerate(golds, 1)]


def test_the_seed_draws_the_chains_and_the_limit_counts_them(questions):
    first = load_problems(questions)
    assert load_problems(questions) == first
    assert load_problems(questions, 1) == first[:1]
    assert load_problems(replace(questions, seed=1)) != first


@pytest.mark.parametrize(("length", "said"), [(1, "must be 2 or more"), (10, "the workload has 9 questions")])
def test_a_length_that_makes_no_chain_is_refused(questions, length, said):
    with pytest.raises(UsageError, match=f"workload.chain={length}: {said}"):
        load_problems(replace(questions, chain=length))


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("Answer 1: It is 7.\nAnswer 2: 8\nAnswer 3: 9", [1, 1, 1]),
        ("**Answer 1:**\nThe answer is 7\n### Answer 2\n7 and then 8\n- answer 3: 9.", [1, 1, 1]),
        ("Answer 2: 8\nAnswer 1: 7", [1, 1, 0]),
        ("Answer 1: 7\nAnswer 2: 8, as in Answer 1: 3", [1, 0, 0]),
        ("Answer 1: 1\nThe answer is 7\nAnswer 3: 8\nAnswer 3: 9\nAnswer 4: 5", [1, 0, 1]),
        ("7, 8, 9", [0, 0, 0]),
        ("", [0, 0, 0]),
        ("Answer 99999999999999999999: 7", [0, 0, 0]),
    ],
)
def test_each_answer_is_graded_for_itself(answer, scores):
    graded = grade(GRADERS["chain"], answer, '["7", "8", "9"]')
    assert graded.places == scores
    assert graded.score == pytest.approx(sum(scores) / 3)
    assert grade(get_grader("chain"), answer, '["7", "8", "9"]') == graded, "the same from the bounded process"


def test_headings_end_an_answer():
    assert split_answers("x\nAnswer 1: a\nb\nAnswer 3: c", 3) == [": a\nb\n\n", None, ": c\n"]
