"""The answers of a conversation: each question graded for itself, recalls apart."""

from __future__ import annotations

import json

import pytest

from experiments.graders import GRADERS, get_grader, grade

GOLD = json.dumps(["7", "8", "9", {"answer_of": 2}, {"number_of": 3, "gold": "40"}])


def graded(*answers: str, gold: str = GOLD):
    return grade(GRADERS["turns"], json.dumps(answers), gold)


@pytest.mark.parametrize(
    ("answers", "places", "recalls"),
    [
        (("7", "The answer is 8", "\\boxed{9}", "8", "40"), [1, 1, 1], [1, 1]),
        (("7", "The answer is 5.", "9", "8", "It was 40."), [1, 0, 1], [0, 1]),
        (("7", "It is 5", "9", "5.0", "$40"), [1, 0, 1], [1, 1]),
        (("7", "no idea", "9", "8", "4"), [1, 0, 1], [0, 0]),
        (("7", "no idea", "9", "none", "40"), [1, 0, 1], [0, 1]),
        (("8", "7", "9"), [0, 0, 1], [0, 0]),
        (("<think>3</think>7", "8<think>", "</think>", "<think>5</think> 8", "40"), [1, 1, 0], [1, 1]),
        ((), [0, 0, 0], [0, 0]),
    ],
)
def test_each_question_counts_and_recalls_stand_apart(answers, places, recalls):
    found = graded(*answers)
    assert (found.error, found.places, found.recalls) == (None, places, recalls)
    assert found.score == pytest.approx(sum(places) / 3)
    assert len(json.loads(found.extracted)) == 5
    assert grade(get_grader("turns"), json.dumps(answers), GOLD) == found, "the same from the bounded process"


def test_what_was_read_is_told_turn_by_turn():
    assert json.loads(graded("7", "8, then 5", "", "5").extracted) == ["7", "5", None, "5", None]
    assert grade(GRADERS["turns"], "", GOLD).places == [0, 0, 0], "of a refused prompt"


def test_without_recalls_there_are_no_grades_of_them():
    found = graded("1", "2", gold='["1", "3"]')
    assert (found.score, found.places, found.recalls) == (0.5, [1, 0], [])


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("The answer is 7", "JSONDecodeError"),
        ("7", "is not a JSON list"),
        ('{"answers": ["7"]}', "is not a JSON list"),
        ('["7", 8]', "is not a JSON list"),
        ('["7", ["8"]]', "is not a JSON list"),
        (json.dumps(["7"] * 6), "6 answers, the conversation 5 turns"),
    ],
)
@pytest.mark.parametrize("grader", [GRADERS["turns"], get_grader("turns")], ids=["here", "bounded"])
def test_an_output_that_holds_no_answers_is_a_fault_of_its_own(grader, output, error):
    found = grade(grader, output, GOLD)
    assert error in found.error
    assert (found.score, found.places, found.recalls) == (0.0, None, None)


@pytest.mark.parametrize("gold", ['["7", "many"]', '["7", {"answer_of": 5}]', '["7", {"number_of": 1}]', "7", ""])
def test_a_gold_that_is_none_is_named_before_the_run(gold):
    assert grade(GRADERS["turns"], "", gold).error is not None
