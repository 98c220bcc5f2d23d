"""Chained arithmetic: questions worked out from their text alone, solutions line by line, facts letter by letter."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.workloads import load_problems
from experiments.workloads.chained_arithmetic import LINE_TOKENS, NAMES, generate, where_lost
from experiments.workloads.problem import Problem

OPTIONS = {
    "defaults": {},
    "long": {"steps": 96, "recalls": 8, "distance": (1000, 2900), "distractors": 4, "restatements": 3},
    "short": {"steps": 8, "recalls": 1, "distance": (32, 96), "restatements": 0, "distractors": 0},
    "chain alone": {"recalls": 0, "distractors": 0},
    "searches": {"dead_ends": 0.5},
    "nothing but searches": {"dead_ends": 1.0},
    "once": {"stated_once": 1.0, "recalls": 5},
    "again": {"stated_once": 0.0, "steps": 60},
    "training": {"split": "train"},
}
OPERATIONS = {"+": lambda a, b: (a + b) % 1000, "-": lambda a, b: (a - b) % 1000, "*": lambda a, b: a * b % 1000}


def work_out(expression: str, values: dict[str, int]) -> int:
    if expression.isdecimal():
        return int(expression)
    if expression[0] == "@":
        return values[expression[1:]]
    branches = expression.split("|")
    results = [
        OPERATIONS[branch[1]](values[branch[0]], int(right) if right.isdecimal() else values[right])
        for branch in branches
        for right in [branch[2:]]
    ]
    return next((result for result in results if result % 2 == 0), results[-1])


def lines_of(problem: Problem) -> list[tuple[str, str]]:
    """(name, what it is) of each line of the question but the last."""
    return [tuple(line.split("=")) for line in problem.question.splitlines()[:-1]]


def values_of(problem: Problem) -> dict[str, int]:
    values: dict[str, int] = {}
    for name, expression in lines_of(problem):
        assert name not in values
        values[name] = work_out(expression, values)
    return values


def far_names(problem: Problem) -> list[str]:
    """The side quantities that a line needs, in the order of these lines."""
    return [what[2:] for _, what in lines_of(problem) if "|" not in what and what[1] in "+-*" and what[2].isalpha()]


def noted(problem: Problem) -> Counter:
    return Counter(what[1:] for _, what in lines_of(problem) if what[0] == "@")


def check_solution(problem: Problem) -> None:
    """Every line repeats its statement, and all that it says is true."""
    values, known = values_of(problem), {}
    *lines, answer = problem.solution.splitlines()
    assert answer == f"Answer: {problem.gold}"
    for line, (name, what) in zip(lines, lines_of(problem), strict=True):
        statement, *work, result = line.split(" ")
        assert statement == f"{name}={what}"
        last = None
        for word in work:
            if ":" in word:
                quantity, digits = word.split(":")
                assert digits == known[quantity], line
            elif word in ("odd", "even"):
                assert word == ("odd" if last % 2 else "even"), line
            else:
                left, operation, right, last = re.fullmatch(r"(\d{3})([-+*])(\d+)=(\d{3})", word).groups()
                last = int(last)
                assert OPERATIONS[operation](int(left), int(right)) == last, line
        known[name] = f"{values[name]:03d}"
        assert result == f"{name}:{known[name]}"
        assert last is None or last == values[name], line


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_golds_follow_from_the_text(options):
    for problem in generate(3, count=60, **options):
        asked = re.fullmatch(r"Find (\w)\.", problem.question.splitlines()[-1])[1]
        assert problem.gold == f"{values_of(problem)[asked]:03d}", problem
        check_solution(problem)
        assert len(lines_of(problem)) == options.get("steps", 36)
        assert problem.kind == "chained_arithmetic"
        assert problem.expected_tokens == len(problem.solution)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_names_follow_each_other(options):
    order = NAMES + NAMES
    assert len(set(NAMES)) == len(NAMES) >= 96
    for problem in generate(4, count=50, **options):
        assert "".join(name for name, _ in lines_of(problem)) in order


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_facts_stand_where_they_say(options):
    recalls = options.get("recalls", 2)
    for problem in generate(5, count=60, **options):
        values, whole = values_of(problem), problem.question + problem.solution
        assert len(problem.facts) == recalls
        for fact, name in zip(problem.facts, far_names(problem), strict=True):
            said = f"{name}:{values[name]:03d}"
            assert fact.text == said
            assert whole[fact.needed - 2 : fact.needed + 3] == said
            assert whole[fact.stated - 2 : fact.stated + 3] == said
            assert fact.stated == whole.rindex(said, 0, fact.needed - 2) + 2, "the last place before"
            line = whole[whole.rindex("\n", 0, fact.needed) + 1 :].partition("\n")[0]
            assert line.startswith(fact.line)
            assert fact.distance == fact.needed - fact.stated > 0
            assert fact.known(problem.solution)
            wrong = f"{name}:{(values[name] + 1) % 1000:03d}"
            forgotten = whole[: fact.needed - 2] + wrong + whole[fact.needed + 3 :]
            assert not fact.known(forgotten[len(problem.question) :])
            assert not fact.known(whole[len(problem.question) : fact.needed])


def test_lines_are_as_many_as_asked_for():
    for recalls, share, restatements, distractors in (
        (4, 0.5, 2, 2),
        (3, 0.0, 1, 4),
        (5, 1.0, 3, 0),
        (5, 0.4, 2, 1),
        (0, 0.5, 2, 3),
    ):
        options = {"recalls": recalls, "stated_once": share, "restatements": restatements, "distractors": distractors}
        for problem in generate(1, count=40, steps=48, **options):
            needed, notes = far_names(problem), noted(problem)
            assert len(needed) == len(set(needed)) == recalls
            again = round((1 - share) * recalls)
            assert sorted(notes.values()) == [restatements] * again * (restatements > 0)
            assert set(notes) <= set(needed)
            mentioned = re.findall(r"\w", "".join(what for _, what in lines_of(problem)) + problem.question[-2])
            idle = [name for name, what in lines_of(problem) if name not in mentioned]
            assert len(idle) == distractors + notes.total()


@pytest.mark.parametrize(
    ("steps", "recalls", "distance"), [(36, 4, (200, 800)), (60, 4, (800, 1600)), (96, 2, (2900, 2900))]
)
def test_distances_are_those_asked_for(steps, recalls, distance):
    """In lines to the line; in tokens, to a line and what lines differ from their mean length."""
    gaps, distances = [], []
    for problem in generate(2, count=200, steps=steps, recalls=recalls, distance=distance, stated_once=1.0):
        names = [name for name, _ in lines_of(problem)]
        for fact, far in zip(problem.facts, far_names(problem), strict=True):
            gaps.append(names.index(fact.line[0]) - names.index(far))
            distances.append(fact.distance)
    assert min(gaps) >= round(distance[0] / LINE_TOKENS)
    assert max(gaps) <= round(distance[1] / LINE_TOKENS)
    assert min(distances) >= 0.9 * distance[0] - LINE_TOKENS
    assert max(distances) <= 1.1 * distance[1] + LINE_TOKENS
    if distance[0] < distance[1]:  # spread over the range, not at one end
        middle = sum(distance) / 2
        assert 0.3 < sum(d < middle for d in distances) / len(distances) < 0.75


def test_restatements_shorten_the_way():
    for problem in generate(0, count=50, distance=(640, 800), stated_once=0.0, steps=48):
        assert max(fact.distance for fact in problem.facts) < 640 * 0.6


def test_dead_ends():
    assert not any("|" in problem.question or "odd" in problem.solution for problem in generate(0, count=50))
    for share in (0.3, 1.0):
        searches, steps, branches = 0, 0, Counter()
        for problem in generate(0, count=100, dead_ends=share):
            values = values_of(problem)
            for line in problem.solution.splitlines()[1:-1]:
                statement, *work = line.split(" ")
                name, what = statement.split("=")
                if what[0] == "@" or what[2].isalpha():
                    continue
                tried = [word for word in work if word in ("odd", "even")]
                searches += bool(tried)
                steps += 1
                if tried:
                    assert len(tried) == what.count("|") + 1 <= 4
                    assert "even" not in tried[:-1]
                    assert tried[-1] == ("odd" if values[name] % 2 else "even")
                    branches[len(tried)] += 1
        assert branches.keys() == {1, 2, 3, 4}
        # Side quantities that nothing or something needs far behind are plain steps.
        assert searches / steps == pytest.approx(share * (36 - 1 - 2 - 2 - 2 - 1) / (36 - 1 - 2 - 2), abs=0.04)


def test_same_seed_same_problems():
    first = list(generate(7, count=50))
    assert first == list(generate(7, count=50))
    assert first[:20] == list(generate(7, count=20))
    assert not {p.question for p in first} & {p.question for p in generate(8, count=50)}
    assert len({p.question for p in first}) == 50
    assert [p.id for p in first[:2]] == ["00000", "00001"]


def test_answers_are_spread():
    golds = [problem.gold for problem in generate(0, count=1000)]
    assert all(re.fullmatch(r"\d{3}", gold) for gold in golds)
    assert len(set(golds)) > 500
    assert max(Counter(golds).values()) < 15
    assert {gold[0] for gold in golds} == set("0123456789")


def test_defaults_are_a_long_thought():
    problems = list(generate(0, count=100))
    assert sum(problem.expected_tokens for problem in problems) / 100 >= 1000
    assert max(problem.expected_tokens for problem in problems) < 2048, "the workload's max_tokens"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("steps=7", ["steps=7", "from 8 to 96"]),
        ("steps=97", ["steps=97", "from 8 to 96"]),
        ("steps=12.5", ["steps=12.5", "whole number"]),
        ("recalls=-1", ["recalls=-1", "at least 0"]),
        ("recalls=1.5", ["recalls=1.5", "whole number"]),
        ("restatements=-2", ["restatements=-2", "at least 0"]),
        ("distractors=-1", ["distractors=-1", "at least 0"]),
        ("stated_once=1.5", ["stated_once=1.5", "from 0 to 1"]),
        ("dead_ends=-0.1", ["dead_ends=-0.1", "from 0 to 1"]),
        ("distance=[200]", ["distance=[200]", "two numbers"]),
        ("distance=[400,200]", ["distance=[400, 200]", "least <= greatest"]),
        ("distance=[10,200]", ["distance=[10, 200]", "32 <= least"]),
        ("distance=300", ["distance=300", "two numbers"]),
        ("distance=[200,2000]", ["distance=[200, 2000]", "at most 1056", "take more steps"]),
        ("recalls=16", ["recalls=16", "steps=36", "fewer"]),
        ("distance=[32,64]", ["distance=[32, 64]", "restatements=2", "fewer restatements"]),
        ("count=0", ["count=0", "at least 1"]),
        ("split=test", ["split=test", "held_out or train"]),
        ("kount=3", ["workload.options.kount", "known: count, steps"]),
    ],
)
def test_wrong_options_are_one_line_with_a_remedy(option, words):
    experiment = load_experiment(["workload=chained_arithmetic", f"++workload.options.{option}"])
    with pytest.raises(UsageError) as caught:
        load_problems(experiment.workload)
    line = str(caught.value)
    assert line.startswith("workload.options")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_recalls_that_do_not_fit_say_what_to_change():
    with pytest.raises(ValueError, match=r"distance=\[1056, 1056\]: 4 such recalls .* steps=36; take more steps"):
        list(generate(0, count=1, distance=(1056, 1056), recalls=4))


def test_where_a_thought_is_lost():
    problem = next(generate(seed=3, count=1))
    solution = problem.solution
    assert where_lost(problem, solution) is None

    def wrong_at(place: int) -> str | None:
        return where_lost(problem, solution[:place] + "§" + solution[place + 1 :])

    fact = problem.facts[0]
    needed = fact.needed - len(problem.question)
    assert [wrong_at(needed + i) for i in range(3)] == ["far fact"] * 3
    second = solution.index("\n") + 1
    line = solution[second:].partition("\n")[0]
    assert wrong_at(second) == wrong_at(second + 3) == "question"
    assert wrong_at(second + line.index(":") + 2) == "near value"
    assert wrong_at(second + line.rindex("=") + 1) == "arithmetic"
    assert wrong_at(second + len(line) - 1) == "arithmetic"
    assert where_lost(problem, solution[: second + 2]) == "question"
    assert where_lost(problem, "") == "question"
