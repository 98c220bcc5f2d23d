"""What is trained on and what is held out never meet, and problems keep the text that the shipped model knows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from random import Random

import pytest

from experiments.reasoner.curriculum import training_problem
from experiments.workloads import GENERATORS
from experiments.workloads.problem import Problem
from experiments.workloads.splits import HELD_OUT, SHARE, TRAIN, draw, split_of

FAMILIES = ("chained_arithmetic", "program_trace", "fragility")
# So short that a family has few problems, and both splits would meet if they could.
SMALL = {
    "chained_arithmetic": {"steps": 8, "recalls": 0, "distractors": 0},
    "program_trace": {"variables": 1, "statements": 1, "iterations": 1},
    "fragility": {"distances": (128,), "kinds": ("fact", "instructions")},
}


def text_of(problem: Problem) -> tuple:
    return problem.history, problem.question


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("small", [True, False], ids=["small", "defaults"])
def test_splits_are_disjoint(family, small):
    drawn = {}
    for split in (HELD_OUT, TRAIN):
        drawn[split] = set()
        for seed in (0, 1, 2):
            problems = list(GENERATORS[family](seed=seed, count=350, split=split, **SMALL[family] if small else {}))
            assert {split_of(problem) for problem in problems} == {split}
            drawn[split] |= {text_of(problem) for problem in problems}
    assert len(drawn[HELD_OUT]) > 900
    assert not drawn[HELD_OUT] & drawn[TRAIN]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_by_default(family):
    assert {split_of(problem) for problem in GENERATORS[family](seed=5, count=50)} == {HELD_OUT}


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.99])
def test_training_never_sees_what_is_held_out(progress):
    for seed in range(3):
        random = Random(seed)
        problems = [training_problem(random, progress) for _ in range(200)]
        assert {split_of(problem) for problem in problems} == {TRAIN}
        kinds = {problem.kind for problem in problems}
        assert kinds == {"chained_arithmetic", "program_trace", "fact", "instructions", "turn"}


def test_training_problems_of_small_programs_are_not_those_held_out():
    """Where there are few problems, training meets them again and again, and still not the held-out ones."""
    held_out = {text_of(problem) for problem in GENERATORS["fragility"](seed=0, count=500, distances=(128,))}
    random = Random(0)
    for _ in range(1500):
        assert text_of(training_problem(random, 0.0)) not in held_out


def test_training_problems_grow():
    lengths = [
        sum(training_problem(Random(seed), progress).expected_tokens for seed in range(150)) / 150
        for progress in (0.0, 0.15, 0.35)
    ]
    assert lengths[0] * 1.5 < lengths[1]
    assert lengths[1] * 1.2 < lengths[2]
    assert max(training_problem(Random(seed), 0.9).expected_tokens for seed in range(300)) < 9216


def test_same_random_same_training_problem():
    for seed in range(20):
        assert training_problem(Random(seed), 0.5) == training_problem(Random(seed), 0.5)


def test_history_counts():
    problem = Problem("", "What is it?", "1")
    splits = {split_of(replace(problem, history=((f"It is {number}.", "ok"),))) for number in range(100)}
    assert splits == {TRAIN, HELD_OUT}
    for number in range(100):
        question = replace(problem, question=f"Is it {number}?")
        assert split_of(question) == split_of(replace(question, gold="2", id="7", solution="x", difficulty="y"))


def test_one_in_eight_is_held_out():
    held_out = sum(split_of(Problem("", f"question {number}", "")) == HELD_OUT for number in range(4000))
    assert held_out / 4000 == pytest.approx(1 / SHARE, abs=0.02)


def test_draw_gives_every_problem_once_and_says_when_there_are_no_more():
    def build(random: Random, number: int) -> Problem:
        return Problem("", f"question {random.randrange(40)}", "")

    available = [number for number in range(40) if split_of(Problem("", f"question {number}", "")) == TRAIN]
    drawn = []
    with pytest.raises(ValueError, match=f"there are only {len(available)} different problems of these options"):
        drawn.extend(problem.question for problem in draw(41, TRAIN, 0, build))
    problems = [problem.question for problem in draw(len(available), TRAIN, 0, build)]
    assert sorted(problems) == sorted(f"question {number}" for number in available)


@pytest.mark.parametrize(
    ("count", "split", "line"),
    [
        (0, TRAIN, "count=0: must be a whole number of at least 1"),
        (1.5, TRAIN, "count=1.5: must be a whole number of at least 1"),
        (1, "test", "split=test: must be held_out or train"),
    ],
)
def test_wrong_options(count, split, line):
    with pytest.raises(ValueError, match=line):
        next(draw(count, split, 0, lambda random, number: Problem("", "", "")))


def test_problems_keep_their_texts():
    """The shipped model learned from these texts: who changes them trains it anew, and then these hashes."""
    digests = {}
    for family in FAMILIES:
        problems = GENERATORS[family](seed=1, count=30)
        texts = [[*map(repr, problem.history), problem.question, problem.solution] for problem in problems]
        digests[family] = hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
    problems = [training_problem(Random(seed), 0.01 * seed) for seed in range(60)]
    digests["training"] = hashlib.sha256(repr([(p.question, p.solution) for p in problems]).encode()).hexdigest()[:16]
    assert digests == {
        "chained_arithmetic": "da38ddf33bd8f747",
        "program_trace": "13a72d78ed386e43",
        "fragility": "af8d64928e40fd89",
        "training": "2ce29d4123231a30",
    }
