"""Program traces: each program is run as the Python that it is, and its trace compared state by state."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.workloads import load_problems
from experiments.workloads.problem import Problem
from experiments.workloads.program_trace import generate
from tests.experiments.graders.python_programs import check_trace, run_python

OPTIONS = {
    "defaults": {},
    "one variable": {"variables": 1, "statements": 1, "iterations": 1},
    "many variables": {"variables": 8, "statements": 12, "iterations": 3},
    "more variables than statements": {"variables": 6, "statements": 2},
    "long": {"iterations": 60, "statements": 2},
    "conditions": {"conditional": 1.0, "comparisons": 0.5},
    "comparisons": {"conditional": 1.0, "comparisons": 1.0},
    "no condition": {"conditional": 0.0},
    "training": {"split": "train"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_golds_and_traces_are_those_of_python(options):
    for problem in generate(2, count=60, **options):
        check_trace(problem.question, problem.solution)
        assert int(problem.gold) == run_python(problem.question).printed
        assert problem.solution.splitlines()[-1] == f"Answer: {problem.gold}"
        assert problem.kind == "program_trace"
        assert problem.expected_tokens == len(problem.solution)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_facts_are_the_states_of_the_iterations(options):
    for problem in generate(3, count=30, **options):
        whole, states = problem.question + problem.solution, run_python(problem.question).iterations
        assert len(problem.facts) == len(states) == options.get("iterations", 4)
        stated = len(problem.question)
        for fact, (i, state) in zip(problem.facts, states, strict=True):
            assert fact.line == f"A i:{i} "
            assert fact.text == " ".join(f"{name}:{value:03d}" for name, value in sorted(state.items()))
            assert whole[fact.needed :].startswith(fact.line + fact.text)
            assert fact.stated == stated, "all values stand there, at the beginning or one iteration before"
            stated = fact.needed
            assert fact.known(problem.solution)
            name = fact.text[0]
            wrong = fact.text.replace(f"{name}:{state[name]:03d}", f"{name}:{(state[name] + 1) % 1000:03d}")
            assert not fact.known(problem.solution.replace(f"{fact.line}{fact.text}", f"{fact.line}{wrong}"))
            assert not fact.known(problem.solution[: fact.needed - len(problem.question)])


def statements_of(problem: Problem) -> list[str]:
    return [line[3:] for line in problem.question.splitlines() if re.match(r"[A-Z]  ", line)]


def test_sizes_are_those_asked_for():
    for variables, statements, iterations in ((1, 1, 1), (3, 5, 4), (8, 12, 2), (5, 3, 9)):
        options = {"variables": variables, "statements": statements, "iterations": iterations}
        for problem in generate(0, count=20, **options):
            start = [line for line in problem.question.splitlines() if line[1] == "="]
            assert len(start) == variables
            assert len(statements_of(problem)) == statements
            assert len(run_python(problem.question).iterations) == iterations
            changed = {re.search(r"(\w)=\(", statement)[1] for statement in statements_of(problem)}
            assert len(changed) >= min(variables, statements), "every variable changes"


@pytest.mark.parametrize("conditional", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("comparisons", [0.0, 0.2, 1.0])
def test_shares_of_conditions(conditional, comparisons):
    problems = generate(0, count=200, conditional=conditional, comparisons=comparisons)
    statements = [statement for problem in problems for statement in statements_of(problem)]
    conditions = [statement for statement in statements if statement.startswith("if ")]
    assert len(conditions) / len(statements) == pytest.approx(conditional, abs=0.06 * (0 < conditional < 1))
    if conditions:
        share = sum("<" in statement for statement in conditions) / len(conditions)
        assert share == pytest.approx(comparisons, abs=0.06 * (0 < comparisons < 1))


def test_one_variable_compares_with_nothing():
    for problem in generate(0, count=20, variables=1, conditional=1.0, comparisons=1.0):
        assert all("%2:" in statement for statement in statements_of(problem))


def test_same_seed_same_problems():
    first = list(generate(7, count=50))
    assert first == list(generate(7, count=50))
    assert first[:20] == list(generate(7, count=20))
    assert not {p.question for p in first} & {p.question for p in generate(8, count=50)}
    assert len({p.question for p in first}) == 50


def test_defaults_are_a_long_thought_with_answers_all_over():
    problems = list(generate(0, count=400))
    assert sum(problem.expected_tokens for problem in problems) / 400 >= 800
    assert max(problem.expected_tokens for problem in problems) < 2048, "the workload's max_tokens"
    golds = [problem.gold for problem in problems]
    assert all(re.fullmatch(r"\d{3}", gold) for gold in golds)
    assert max(Counter(golds).values()) < 12


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("variables=0", ["variables=0", "from 1 to 8"]),
        ("variables=9", ["variables=9", "from 1 to 8"]),
        ("statements=13", ["statements=13", "from 1 to 12"]),
        ("statements=2.5", ["statements=2.5", "whole number"]),
        ("iterations=0", ["iterations=0", "from 1 to 200"]),
        ("conditional=1.1", ["conditional=1.1", "from 0 to 1"]),
        ("comparisons=-1", ["comparisons=-1", "from 0 to 1"]),
        ("count=0", ["count=0", "at least 1"]),
        ("split=test", ["split=test", "held_out or train"]),
    ],
)
def test_wrong_options_are_one_line_with_a_remedy(option, words):
    experiment = load_experiment(["workload=program_trace", f"++workload.options.{option}"])
    with pytest.raises(UsageError) as caught:
        load_problems(experiment.workload)
    line = str(caught.value)
    assert line.startswith("workload.options")
    for word in words:
        assert word in line
