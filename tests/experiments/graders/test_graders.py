"""Graders: what is right, what is wrong, and what is taken for the answer."""

from __future__ import annotations

import pytest

from experiments.errors import UsageError
from experiments.graders import get_grader, grade
from experiments.graders.boxed import last_boxed

ALTERNATIVES = ["The answer is {}.", "{}", "#### {}", "It is either {}.", "\\boxed{{{}}}"]


@pytest.mark.parametrize("text", ALTERNATIVES)
@pytest.mark.parametrize(
    ("numbers", "gold", "score"),
    [
        ("18 or 20", "18", 0),
        ("18 or 20", "20", 0),
        ("18, or 20 eggs", "18", 0),
        ("18 eggs or 20 eggs", "20", 0),
        ("$18 or $20", "18", 0),
        ("18 or 18.0", "18", 1),
        ("0.5 or 1/2", "0.5", 1),
    ],
)
def test_of_two_alternatives_neither_is_the_answer(text, numbers, gold, score):
    assert grade(get_grader("number"), text.format(numbers), gold).score == score


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("The answer is 90 minutes or 1.5 hours.", "90"),
        ("The answer is $18 or 1800 cents.", "18"),
        ("The answer is 75% or 0.75.", "75"),
        ("The answer is 0.75 or 75%.", "0.75"),
        ("It may be 18 or 20. The answer is 20.", "20"),
        ("It takes 5 or 6 steps to find 18", "18"),
    ],
)
def test_the_same_in_two_units_is_no_alternative(answer, gold):
    assert grade(get_grader("number"), answer, gold).score == 1


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("$2.5M", "2500000"),
        ("The answer is \\$2.5M.", "2500000"),
        ("\\boxed{\\$2.5M}", "2500000"),
        ("It costs €3B a year", "3000000000"),
        ("USD 1.2bn", "1200000000"),
        ("The width is $5m$", "5"),
        ("It is 5M away", "5"),
        ("The answer is $5MB", "5"),
    ],
)
def test_letters_for_millions_of_a_currency(answer, gold):
    assert grade(get_grader("number"), answer, gold).score == 1


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("The answer is 18", "18", 1),
        ("The answer is 18.", "18", 1),
        ("The answer is 17.", "18", 0),
        ("", "18", 0),
        ("I do not know.", "18", 0),
        ("The answer is N", "18", 0),
        ("3 + 15 = 18", "18", 1),
        ("She has 18 eggs left.", "18", 1),
        ("It makes $18 a day.", "18", 1),
        ("The answer is \\$18.00 a day", "18", 1),
        ("18.00", "18", 1),
        ("18.5", "18", 0),
        (".5", "0.5", 1),
        ("The total is 1,234,500 dollars", "1234500", 1),
        ("1{,}234", "1,234", 1),
        ("we counted 3, 4, 5", "5", 1),
        ("The answer is -7.", "-7", 1),
        ("The answer is −7", "-7", 1),
        ("The answer is 7", "-7", 0),
        ("-$7", "-7", 1),
        ("15 - 8 gives 7", "7", 1),
        ("- 7 apples", "7", 1),
        ("#### 18\nThat took 3 steps.", "18", 1),
        ("so \\boxed{18}. Check: 9 times 2.", "18", 1),
        ("\\boxed{7} no, \\boxed{18}", "18", 1),
        ("\\boxed{\\frac{3}{4}}", "0.75", 1),
        ("3/4", "0.75", 1),
        ("\\boxed{042}", "42", 1),
        ("**Answer:** 18 eggs", "18", 1),
        ("The final answer is **18**.", "18", 1),
        ("The answer is 9 + 9 = 18. I checked it 2 times.", "18", 1),
        ("The answer is:\n18\n", "18", 1),
        ("The answer is N, and N is 18", "18", 1),
        ("25%", "25", 1),
        ("v2 has nothing", "2", 0),
        ("<think>The answer is 3.</think>The answer is 18.", "18", 1),
        ("#### 18", "It is 9 + 9. #### 18", 1),
    ],
)
def test_numbers(answer, gold, score):
    graded = grade(get_grader("number"), answer, gold)
    assert graded.error is None
    assert graded.score == score, graded


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1),
        ("The answer is 1/2.", "\\frac{1}{2}", 1),
        ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", 0),
        ("", "3", 0),
        ("no idea", "3", 0),
        ("\\boxed{(3, \\frac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)", 1),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", 1),
        ("$x=5$", "5", 1),
        ("\\boxed{-7}", "7", 0),
        ("\\boxed{18\\text{ eggs}}", "18", 1),
        ("\\boxed{1,234}", "1234", 1),
        ("\\boxed{2} no, \\boxed{3}", "3", 1),
        ("\\boxed{3} no, \\boxed{2}", "3", 0),
        ("\\boxed{\\text{east}}", "\\text{east}", 1),
    ],
)
def test_mathematics(answer, gold, score):
    graded = grade(get_grader("math"), answer, gold)
    assert graded.error is None
    assert graded.score == score, graded


@pytest.mark.parametrize(("name", "gold"), [("number", "four"), ("math", ""), ("f1", "the"), ("literal", "f(x)")])
def test_gold_that_is_none_is_a_fault_of_the_grader(name, gold):
    graded = grade(get_grader(name), "The answer is 4", gold)
    assert graded.score == 0
    assert graded.error.startswith("ValueError: the gold")


@pytest.mark.parametrize(("answer", "score"), [("yes", 1), (" yes\n", 1), ("Yes", 0), ("", 0), ("yes, it is", 0)])
def test_exact(answer, score):
    assert grade(get_grader("exact"), answer, "yes").score == score


@pytest.mark.parametrize(
    ("answer", "score", "extracted"),
    [
        ("C print(k) k:432\nAnswer: butter 432", 1, "butter 432"),
        ("Answer:   butter 432  \nand so on", 1, "butter 432"),
        ("Answer:butter 432", 1, "butter 432"),
        ("Answer: island 111\nAnswer: butter 432", 1, "butter 432"),
        ("Answer: butter 432\nAnswer: island 111", 0, "island 111"),
        ("Answer: butter 432432", 0, "butter 432432"),
        ("Answer: butter 43", 0, "butter 43"),
        ("Answer: Butter 432", 0, "Butter 432"),
        ("Answer: butter  432", 0, "butter  432"),
        ("Answer: 432", 0, "432"),
        ("Answer: butter", 0, "butter"),
        ("Answer:\nbutter 432", 0, None),
        ("Answer:", 0, None),
        ("answer: butter 432", 0, None),
        ("butter 432", 0, None),
        ("", 0, None),
    ],
)
def test_final(answer, score, extracted):
    graded = grade(get_grader("final"), answer, " butter 432")
    assert (graded.score, graded.extracted, graded.error) == (score, extracted, None)


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("Ulm", "Ulm", 1),
        ("The answer: ULM!", "ulm", 2 / 3),
        ("in the old town of Ulm", "Ulm\nthe old town", 4 / 7),
        ("Paris", "Ulm", 0),
        ("", "Ulm", 0),
        ("the", "Ulm", 0),
        ("18 eggs", "18", 2 / 3),
        ("\\frac{1}{2}", "1/2", 0),
        ("red red red", "red", 1 / 2),
        ("<think>Ulm</think>Bonn", "Ulm", 0),
    ],
)
def test_f1(answer, gold, score):
    graded = grade(get_grader("f1"), answer, gold)
    assert graded.error is None
    assert graded.score == pytest.approx(score), graded


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("[ANSWER]\n[1, 2]\n[/ANSWER]", "[1,2]", 1),
        ("[ANSWER]1[/ANSWER] no\n[ANSWER]2", "2", 1),
        ("[ANSWER] assert f(1) == 'a' [/ANSWER]", '"a"', 1),
        ("So it is\n`{1: 'b'}`", "{1: 'b'}", 1),
        ("(1, 2)", "[1, 2]", 0),
        ("None", "None", 1),
        ("", "None", 0),
        ("None", "''", 0),
        ("__import__('os').abort()", "3", 0),
        ("(" * 100_000, "3", 0),
        ("9" * 100_000, "3", 0),
        ("-" * 100_000 + "1", "3", 0),
    ],
)
def test_values(answer, gold, score):
    graded = grade(get_grader("literal"), answer, gold)
    assert graded.error is None
    assert graded.score == score, graded


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("\\boxed{12\\text{ cm}}", "13"),
        ("\\boxed{}", "13"),
        ("\\frac{13}{0}", "13"),
        ("$\\frac{1}{13}$", "13"),
        ("13x", "12"),
    ],
)
def test_wrong_empty_and_odd_answers_score_0(answer, gold):
    for name in ("number", "math", "f1"):
        graded = grade(get_grader(name), answer, gold)
        assert (graded.score, graded.error) == (0, None), name


def test_nothing_is_graded_by_none():
    assert grade(get_grader("none"), "x", "y").score is None


def test_what_was_read_is_kept():
    assert grade(get_grader("number"), "The answer is $1,250.", "3").extracted == "1250"
    assert grade(get_grader("math"), "It is \\boxed{\\frac{1}{2}}.", "3").extracted == "\\frac{1}{2}"
    assert grade(get_grader("exact"), "", "3").extracted is None


def test_unknown_grader_is_refused():
    with pytest.raises(UsageError, match="must be one of number, math, exact"):
        get_grader("mind")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{3}", "3"),
        ("\\boxed{unclosed", None),
        ("none", None),
    ],
)
def test_last_boxed_matches_braces(text, boxed):
    assert last_boxed(text) == boxed
