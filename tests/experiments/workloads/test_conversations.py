"""Conversations: questions as turns, and turns at the end that ask for something earlier again."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from experiments.config.schema import WorkloadConfig
from experiments.errors import UsageError
from experiments.workloads import load_problems
from experiments.workloads.conversations import first_number_of

TURNS = 5


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"A box of item {n} has {n}.50 in it, and 7 more.", "answer": str(n)} for n in range(200)]
    rows[4]["answer"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return WorkloadConfig(
        name="numbers", path=str(path), grader="turns", turns=TURNS, recalls=3, template="{question} Think."
    )


def test_each_question_that_can_be_asked_is_in_one_conversation(questions):
    problems = load_problems(questions)
    assert len(problems) == 39, "199 questions are 39 conversations of five"
    places = [place for problem in problems for place in problem.id.split("+")]
    assert len(set(places)) == len(places) == 39 * TURNS
    assert "4" not in places
    for problem in problems:
        numbers = problem.id.split("+")
        golds = json.loads(problem.gold)
        assert golds[:TURNS] == numbers
        texts = [f"Question {i}: A box of item {n} has {n}.50 in it, and 7 more." for i, n in enumerate(numbers, 1)]
        assert problem.question == texts[0], "the renderer puts it into the template"
        assert problem.follow_ups[: TURNS - 1] == tuple(f"{text} Think." for text in texts[1:])
        assert len(problem.follow_ups) + 1 == len(golds) == TURNS + 3


def test_recalls_ask_for_answers_and_numbers_in_turn(questions):
    for problem in load_problems(questions):
        recalls = json.loads(problem.gold)[TURNS:]
        assert [set(recall) for recall in recalls] == [{"answer_of"}, {"number_of", "gold"}, {"answer_of"}]
        first, second, third = problem.follow_ups[TURNS - 1 :]
        for text, recall in ((first, recalls[0]), (third, recalls[2])):
            asked = f"What was your final answer to question {recall['answer_of']}? Reply with the number only."
            assert text == asked
        named = problem.id.split("+")[recalls[1]["number_of"] - 1]
        assert recalls[1]["gold"] == named
        assert f'in question {recalls[1]["number_of"]}, which began with "A box of item"? Reply' in second


def test_what_is_recalled_is_spread_over_all_places(questions):
    golds = [json.loads(problem.gold) for problem in load_problems(questions)]
    places = [[recall.get("answer_of") or recall["number_of"] for recall in gold[TURNS:]] for gold in golds]
    assert all(len(set(row)) == 3 for row in places), "nothing is recalled twice"
    assert all(min(row) <= 1 and 2 <= sorted(row)[1] <= 3 and max(row) >= 4 for row in places)
    for recall in zip(*places, strict=True):
        assert set(recall) == {1, 2, 3, 4, 5}, "each recall reaches from near to far"
    counts = Counter(place for row in places for place in row)
    assert min(counts.values()) > 10


def test_the_seed_draws_the_conversations_and_the_limit_counts_them(questions):
    first = load_problems(questions)
    assert load_problems(questions) == first
    assert load_problems(questions, 2) == first[:2]
    assert load_problems(replace(questions, seed=1)) != first
    plain = load_problems(replace(questions, recalls=0))
    assert [p.id for p in plain] == [p.id for p in first]
    assert all(len(p.follow_ups) == TURNS - 1 for p in plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"turns": 1, "recalls": 0}, "workload.turns=1: must be 2 or more"),
        ({"turns": 0, "recalls": 0}, "workload.turns=0: must be 2 or more"),
        ({"turns": 200}, "workload.turns=200: the workload has 199 questions"),
        ({"recalls": 6}, "workload.recalls=6: must be from 0 to workload.turns=5"),
        ({"recalls": -1}, "workload.recalls=-1: must be from 0"),
        ({"turns": None}, "workload.recalls=3: only a conversation recalls"),
        ({"chain": 2}, "workload.turns=5: does not go with workload.chain=2"),
    ],
)
def test_what_makes_no_conversation_is_refused(questions, options, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        load_problems(replace(questions, **options))


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Tom and his old friends all bought 1,200 red apples for $3 each.", ("Tom and his old friends all", "1200")),
        ("A robe takes 2 bolts of blue fiber.", ("A robe takes", "2")),
        ("Ann paid $2.50 for it.", ("Ann paid", "2.5")),
        ("She ate 3/4 of 8 pies.", ("She ate", "0.75")),
        ("12 men stand in a row of 3.", None),
        ("Two men have 3 hats.", None),
        ("He has half as many, which is 4.", None),
        ("The ratio is 7:11, the sum 36.", None),
        ("Nobody came.", None),
        ("", None),
    ],
)
def test_how_a_question_begins_does_not_give_its_number_away(question, found):
    assert first_number_of(question) == found


def test_where_no_question_has_a_number_its_answer_is_recalled(questions, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What {'very ' * n}odd?", "answer": "1"}) + "\n" for n in range(9))
    )
    (problem,) = load_problems(replace(questions, path=str(path)))
    assert [set(recall) for recall in json.loads(problem.gold)[TURNS:]] == [{"answer_of"}] * 3


def test_a_part_of_a_mix_can_not_be_a_conversation():
    parts = {"a": {"generator": "word_problems", "turns": 2}}
    with pytest.raises(UsageError, match=r"workload.parts.a.turns=2: .* set workload.turns"):
        load_problems(WorkloadConfig(parts=parts))
