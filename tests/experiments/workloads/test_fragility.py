"""Fragile problems: golds by Python, distances as asked for, and facts that are lost when their value is."""

from __future__ import annotations

import re

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.graders import get_grader, grade
from experiments.workloads import load_problems
from experiments.workloads.fragility import KINDS, MANNERS, generate
from experiments.workloads.problem import Problem
from tests.experiments.graders.python_programs import check_trace, run_python

DISTANCES = (128, 512, 1024, 2048)


def problems(kind: str, distance: int = 512, count: int = 30, **options) -> list[Problem]:
    return list(generate(1, count=count, kinds=[kind], distances=[distance], manners=MANNERS, **options))


def fields_of(problem: Problem) -> tuple[str, str, str]:
    """Word, manner and program of a problem with instructions."""
    first, second, program = problem.question.split("\n", 2)
    word = re.fullmatch(r"Before the answer write ([a-z]+)\.", first)[1]
    return word, re.fullmatch(r"Write the answer (\w+)\.", second)[1], program


@pytest.mark.parametrize("distance", DISTANCES)
def test_fact(distance):
    for problem in problems("fact", distance):
        check_trace(problem.question, problem.solution)
        assert int(problem.gold) == run_python(problem.question).printed
        assert problem.history == ()
        computed = [line for line in problem.question.splitlines() if line.startswith("A ")]
        name = computed[0][2]
        mentions = [line[0] for line in problem.question.splitlines() if re.search(rf"\b{name}\b", line)]
        assert mentions == ["A", "D"], "computed before the loop, needed behind it"
        (fact,) = problem.facts
        assert fact.text.startswith(f"{name}:")


@pytest.mark.parametrize("distance", DISTANCES)
def test_turn(distance):
    for problem in problems("turn", distance):
        ((question, answer),) = problem.history
        check_trace(question, answer)
        value = run_python(question).printed
        assert answer.endswith(f"\nAnswer: {value:03d}")
        (fact,) = problem.facts
        name = fact.text[0]
        assert fact.text == f"{name}:{value:03d}"
        assert f"{name}=" not in problem.question, "the value stands in the earlier turn alone"
        known = {name: value}
        check_trace(problem.question, problem.solution, known)
        assert int(problem.gold) == run_python(problem.question, known).printed


@pytest.mark.parametrize("distance", DISTANCES)
def test_instructions(distance):
    manners = set()
    for problem in problems("instructions", distance):
        word, manner, program = fields_of(problem)
        check_trace(program, problem.solution)
        printed = f"{run_python(program).printed:03d}"
        expected = {"backwards": printed[::-1], "twice": printed + printed, "plainly": printed}[manner]
        assert problem.gold == f"{word} {expected}"
        assert [fact.text for fact in problem.facts] == [word, expected]
        manners.add(manner)
    assert manners == set(MANNERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_distances(kind, distance):
    for problem in problems(kind, distance):
        lines = problem.solution.splitlines(keepends=True)
        head = next(number for number, line in enumerate(lines) if " i:100 " in line)
        end = next(number for number, line in enumerate(lines) if line.endswith(" end\n"))
        loop = sum(map(len, lines[head:end]))
        assert loop == pytest.approx(distance, rel=0.15, abs=29), "to half an iteration"
        for fact in problem.facts:
            assert loop < fact.distance < loop + 150, "the whole loop lies in between"


@pytest.mark.parametrize("kind", KINDS)
def test_facts_stand_where_they_say(kind):
    for problem in problems(kind):
        before = "".join(text for turn in problem.history for text in turn)
        whole = before + problem.question + problem.solution
        for fact in problem.facts:
            stated, needed = (place + len(before) for place in (fact.stated, fact.needed))
            value = fact.text.rpartition(":")[2]
            assert whole[needed : needed + len(value)] == value
            line = whole[whole.rindex("\n", 0, needed) + 1 :].partition("\n")[0]
            assert line.startswith(fact.line)
            if kind != "instructions":
                assert whole[stated : stated + 3] == value
            elif fact is problem.facts[0]:
                assert whole[stated:].startswith(f"{value}.\n")
            else:
                assert whole[stated:].startswith(f"{fields_of(problem)[1]}.\n")
            if kind != "instructions":
                assert fact.text not in whole[stated + 1 : needed - 2], "the last place before"


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_known_and_lost(kind):
    for problem in problems(kind, 128):
        for fact in problem.facts:
            assert fact.known(problem.solution)
            place = fact.needed - len(problem.question)
            value = fact.text.rpartition(":")[2]
            other = "0" if value[0] != "0" else "1"
            wrong = problem.solution[:place] + other + problem.solution[place + 1 :]
            assert not fact.known(wrong)
            assert not fact.known(problem.solution[:place])
            assert not fact.known("")


def test_the_wrong_manner_is_not_known():
    seen = set()
    for problem in problems("instructions", 128):
        word, manner, program = fields_of(problem)
        printed = f"{run_python(program).printed:03d}"
        manners = {"backwards": printed[::-1], "twice": printed * 2, "plainly": printed}
        for other, answer in manners.items():
            same = answer == manners[manner]
            thought = f"Answer: {word} {answer}"
            assert problem.facts[0].known(thought)
            assert problem.facts[1].known(thought) == same, (manner, other)
            assert grade(get_grader("final"), thought, problem.gold).score == same
            seen.add((manner, other))
    assert len(seen) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_grader(kind):
    final = get_grader("final")
    for problem in problems(kind, 128):
        assert grade(final, problem.solution, problem.gold).score == 1
        *_, number = problem.gold.split()
        wrong = f"{(int(number[:3]) + 1) % 1000:03d}{number[3:]}"
        assert grade(final, problem.solution.removesuffix(number) + wrong, problem.gold).score == 0
        assert grade(final, problem.solution.rpartition("\nAnswer")[0], problem.gold).score == 0
        assert grade(final, "", problem.gold).score == 0
        if kind == "instructions":
            word = problem.gold.split()[0]
            assert grade(final, f"Answer: not{word} {number}", problem.gold).score == 0
            assert grade(final, f"Answer: {number}", problem.gold).score == 0


def test_kinds_and_distances_come_in_turn():
    found = [(p.kind, p.difficulty) for p in generate(0, count=9, distances=(128, 256, 512))]
    assert found == [(kind, f"{kind} at {distance}") for distance in (128, 256, 512) for kind in KINDS]


def test_only_the_manners_asked_for():
    for manner in MANNERS:
        chosen = generate(0, count=10, kinds=["instructions"], distances=[128], manners=[manner])
        assert {fields_of(problem)[1] for problem in chosen} == {manner}


def test_same_seed_same_problems():
    first = list(generate(7, count=30))
    assert first == list(generate(7, count=30))
    assert first[:12] == list(generate(7, count=12))
    assert not {p.question for p in first} & {p.question for p in generate(8, count=30)}
    assert max(problem.expected_tokens for problem in first) < 4096, "the workload's max_tokens"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("kinds=[facts]", ["kinds=['facts']", "facts must be one of fact, instructions, turn"]),
        ("kinds=[]", ["kinds=[]", "at least one of fact"]),
        ("manners=[loudly]", ["manners=['loudly']", "backwards, twice, plainly"]),
        ("manners=[]", ["manners=[]", "at least one of"]),
        ("distances=[64]", ["distances=[64]", "64 must be from 128 to 8192"]),
        ("distances=[512,9000]", ["9000 must be from 128 to 8192"]),
        ("distances=[]", ["distances=[]", "at least one"]),
        ("count=-1", ["count=-1", "at least 1"]),
        ("split=test", ["split=test", "held_out or train"]),
    ],
)
def test_wrong_options_are_one_line_with_a_remedy(option, words):
    experiment = load_experiment(["workload=fragility", f"++workload.options.{option}"])
    with pytest.raises(UsageError) as caught:
        load_problems(experiment.workload)
    line = str(caught.value)
    assert line.startswith("workload.options")
    for word in words:
        assert word in line
