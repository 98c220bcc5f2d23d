"""Workloads: generated problems are right, files and data sets are read, faults are named."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.workloads import load_problems
from experiments.workloads.word_problems import KINDS, generate

# What each kind asks, computed from the numbers in its text alone, in the order in which they stand there.
SOLUTIONS = {
    "gain": lambda x, y: x + y,
    "loss": lambda x, y: x - y,
    "together": lambda x, y: x + y,
    "more_than": lambda x, y: x - y,
    "equal_groups": lambda n, each: n * each,
    "share": lambda total, friends: total / friends,
    "price": lambda cost, n: cost * n,
    "change": lambda cost, note: note - cost,
    "distance": lambda speed, hours: speed * hours,
    "age_later": lambda age, years: age + years,
    "younger": lambda age, years: age - years,
    "rows": lambda n, seats: n * seats,
    "twice": lambda x: 2 * x,
    "half": lambda x: x / 2,
    "weeks": lambda n: 7 * n,
    "legs": lambda n, legs: n * legs,
    "warmer": lambda x, y: x + y,
    "packs": lambda total, size: total / size,
    "left_over": lambda total, size: total % size,
    "pages_left": lambda read, pages: pages - read,
    "minutes": lambda hours: 60 * hours,
    "two_purchases": lambda n, cost, other: n * cost + other,
    "change_of_several": lambda cost, n, note: note - n * cost,
    "gain_and_loss": lambda x, y, z: x + y - z,
    "boxes_less_sold": lambda n, each, sold: n * each - sold,
    "share_the_rest": lambda total, eaten, people: (total - eaten) / people,
    "earn_and_spend": lambda wage, hours, spent: wage * hours - spent,
    "savings": lambda start, weekly, n: start + weekly * n,
    "bus_stop": lambda x, off, on: x - off + on,
    "more_and_together": lambda x, more: x + (x + more),
    "twice_and_together": lambda x: x + 2 * x,
    "daily_reading": lambda pages, daily, days: pages - daily * days,
    "there_and_back": lambda km, days: 2 * km * days,
    "withered": lambda n, each, lost: n * each - lost,
    "teams": lambda girls, boys, size: (girls + boys) / size,
    "eggs_missing": lambda cakes, each, have: cakes * each - have,
    "filling": lambda holds, start, rate: (holds - start) / rate,
    "discount": lambda usual, off, n: (usual - off) * n,
    "slices": lambda n, each, eaten: n * each - eaten,
    "fence": lambda length, width: 2 * (length + width),
    "half_and_more": lambda x, y: x / 2 + y,
    "pocket_coins": lambda n, coin, rest: n * coin + rest,
    "three_days": lambda x, y, z: x + y + z,
}


def write_lines(path: Path, *items: dict) -> Path:
    text = "\n".join(map(json.dumps, items)) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def load(*options: str, limit: int | None = None):
    return load_problems(load_experiment(options).workload, limit)


class TestWordProblems:
    def test_golds_follow_from_the_text(self):
        assert SOLUTIONS.keys() == KINDS.keys()
        for seed in range(3):
            for problem in generate(seed, 10 * len(KINDS)):
                numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
                assert SOLUTIONS[problem.kind](*numbers) == int(problem.gold), problem
                assert int(problem.gold) > 0

    def test_texts_are_whole(self):
        for problem in generate(5, 3 * len(KINDS)):
            assert re.fullmatch(r"[A-Z][\w ,.'$?]+\?", problem.question), problem
            assert "  " not in problem.question

    def test_same_seed_same_problems(self):
        assert generate(7, 100) == generate(7, 100)
        assert not {p.question for p in generate(7, 100)} & {p.question for p in generate(8, 100)}

    def test_smaller_set_is_a_prefix(self):
        assert generate(0, 300)[:50] == generate(0, 50)

    def test_problems_differ(self):
        problems = generate(0, 3000)
        assert len({p.question for p in problems}) == len({p.id for p in problems}) == 3000

    def test_every_kind_comes_in_turn(self):
        assert {p.kind for p in generate(3, len(KINDS))} == set(KINDS)

    def test_steps_choose_the_kinds(self):
        assert {KINDS[p.kind][0] for p in generate(0, 60, steps=[1])} == {1}
        assert {KINDS[p.kind][0] for p in generate(0, 60, steps=[2])} == {2}

    def test_limit_and_seed_by_config(self):
        assert [p.question for p in load("workload.seed=4", limit=5)] == [p.question for p in generate(4, 5)]

    def test_exhausted_kind_says_so(self, monkeypatch):
        def sums(d):
            return "What is 1 and 1?", 2

        monkeypatch.setitem(KINDS, "sums", (3, sums))
        with pytest.raises(ValueError, match="sums has no more new questions"):
            generate(0, 2, steps=[3])

    @pytest.mark.parametrize(
        ("option", "line"),
        [
            ("workload.options.count=0", "workload.options: count=0"),
            ("workload.options.steps=[9]", "workload.options: count="),
            ("workload.options.steps=1", "workload.options: "),
            (
                "workload.options.kount=1",
                "workload.options.kount: unknown option of word_problems; known: count, steps",
            ),
            ("workload.generator=riddles", "workload.generator=riddles: must be one of word_problems"),
        ],
    )
    def test_wrong_options(self, option, line):
        with pytest.raises(UsageError) as caught:
            load(option)
        assert str(caught.value).startswith(line)


class TestFiles:
    @pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
    def test_lines(self, tmp_path, name):
        path = write_lines(tmp_path / name, {"q": "1+1", "a": 2, "key": "x"}, {"q": "ünï", "a": "3", "key": "y"})
        problems = load(
            "workload=jsonl", f"workload.path={path}", "workload.question=q", "workload.answer=a", "workload.id=key"
        )
        assert [(p.id, p.question, p.gold) for p in problems] == [("x", "1+1", "2"), ("y", "ünï", "3")]

    def test_parquet(self, tmp_path):
        import pandas as pd

        pd.DataFrame({"question": ["1+1", "2+2"], "answer": [2, 4]}).to_parquet(tmp_path / "q.parquet")
        problems = load("workload=jsonl", f"workload.path={tmp_path / 'q.parquet'}", limit=1)
        assert [(p.id, p.question, p.gold) for p in problems] == [("0", "1+1", "2")]

    @pytest.mark.parametrize(("answer", "gold"), [("6 * 3 = <<6*3=18>>18\n#### 18", "18"), ("18", "18"), (18, "18")])
    def test_gsm8k_as_upstream_and_as_plain_numbers(self, tmp_path, answer, gold):
        path = write_lines(tmp_path / "q.jsonl", {"question": "How many?", "answer": answer})
        assert load("workload=gsm8k", f"workload.path={path}")[0].gold == gold

    @pytest.mark.parametrize(
        ("item", "gold"),
        [
            ({"solution": "First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "answer": "corrupt"}, "\\frac{1}{2}"),
            ({"solution": "No box.", "answer": "7"}, "7"),
            ({"answer": "7"}, "7"),
        ],
    )
    def test_math_gold_is_the_last_box_of_the_solution(self, tmp_path, item, gold):
        path = write_lines(tmp_path / "q.jsonl", {"problem": "What?"} | item)
        assert load("workload=math500", f"workload.path={path}")[0].gold == gold

    def test_aime_as_upstream_and_with_plain_answers(self, tmp_path):
        upstream = write_lines(tmp_path / "a.jsonl", {"id": 0, "problem": "P", "solution": "\\boxed{204}", "url": "-"})
        plain = write_lines(tmp_path / "b.jsonl", {"id": 0, "problem": "P", "answer": "204"})
        assert load("workload=aime24", f"workload.path={upstream}") == load("workload=aime24", f"workload.path={plain}")

    @pytest.mark.parametrize(
        ("name", "content", "line"),
        [
            ("q.jsonl", b'{"question": "1"}\n', "workload.answer=answer: item 0 has no such field; it has question"),
            ("q.jsonl", b'{"answer": "1"}\n', "workload.question=question: item 0 has no such field; it has answer"),
            ("q.jsonl", b'{"question": "1", "answer": 2}\n{oops\n', "{path}: line 2 is not valid JSON"),
            ("q.jsonl", b"[1, 2]\n", "{path}: line 1 is not a JSON object"),
            ("q.jsonl", b"\xff\xfe", "{path}: 'utf-8' codec"),
            ("q.jsonl", b"\n", "workload jsonl holds no problem"),
            ("q.jsonl.gz", b"plain", "{path}: Not a gzipped file"),
            ("q.parquet", b"plain", "{path}: "),
            ("q.csv", b"a,b", "{path}: must end in .jsonl, .jsonl.gz or .parquet"),
            (None, b"", "{path}: no such file"),
            (
                "q.jsonl",
                b'{"question": ' + b"[" * 100_000 + b"\n",
                "{path}: line 1 is not valid JSON",
            ),
            ("q.jsonl", b'{"question": "?", "answer": ' + b"9" * 5_000 + b"}\n", "{path}: line 1 is not valid JSON"),
        ],
    )
    def test_faults_are_named(self, tmp_path, name, content, line):
        path = tmp_path / (name or "missing.jsonl")
        if name:
            path.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            load("workload=jsonl", f"workload.path={path}")
        assert str(caught.value).startswith(line.replace("{path}", f"workload.path={path}"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("item", "options", "error"),
        [
            ({"question": None, "answer": "1"}, [], "workload.question=question: is null in item 1"),
            ({"answer": "1"}, [], "workload.question=question: item 1 has no such field; it has answer"),
            ({"question": "?", "answer": None}, [], "workload.answer=answer: is null or empty in item 1"),
            ({"question": "?", "answer": [None]}, [], "workload.answer=answer: is null or empty in item 1"),
            ({"question": "?"}, [], "workload.answer=answer: item 1 has no such field; it has question"),
            (
                {"question": "?", "hint": None, "answer": "1"},
                ["workload.question='{question} {hint}'"],
                "workload.question=hint: is null in item 1",
            ),
            ({"question": "?", "answer": "1", "key": None}, ["workload.id=key"], "workload.id=key: is null in item 1"),
            ({"question": "a\ud800", "answer": "1"}, [], "the question of item 1 holds half a surrogate pair"),
            ({"question": "?", "answer": "\udc00"}, [], "the gold of item 1 holds half a surrogate pair"),
            ({"question": "?", "answer": "1", "key": "\udc00"}, ["workload.id=key"], "the id of item 1 holds half"),
            (
                {"question": "?", "answer": "1", "key": [1]},
                ["workload.id=key"],
                "workload.id=key: is a list, not",
            ),
            ({"question": ["?"], "answer": "1"}, [], "workload.question=question: is a list, not a text or number, in"),
            ({"question": {"text": "?"}, "answer": "1"}, [], "workload.question=question: is a mapping, not a text"),
            ({"question": math.nan, "answer": "1"}, [], "workload.question=question: is null in item 1"),
            (
                {"question": "?", "answer": {"value": 1}},
                [],
                "workload.answer=answer: is a mapping, not a",
            ),
            ({"question": "?", "answer": ["1", ["2"]]}, [], "workload.answer=answer: is a list, not a text or number"),
            ({"question": "?", "answer": math.nan}, [], "workload.answer=answer: is null or empty in item 1"),
            ({"question": "?", "tests": [["1", None]]}, ["workload.tests=pairs"], "an input or output is null"),
            ({"question": "?", "tests": None}, ["workload.tests=pairs"], "the tests of item 1 can't be read"),
        ],
    )
    def test_an_item_that_cannot_be_asked_costs_itself(self, tmp_path, item, options, error):
        good = {"question": "1+1", "hint": "none", "answer": "2", "key": "?", "tests": [["1", "2"]]}
        path = write_lines(tmp_path / "q.jsonl", good, item, good | {"key": "c"})
        problems = load("workload=jsonl", f"workload.path={path}", *options)
        assert [problem.error is None for problem in problems] == [True, False, True]
        assert error in problems[1].error
        assert "None" not in "".join(problem.question + problem.gold for problem in problems)
        for text in (problems[1].id, problems[1].question, problems[1].gold, problems[1].error):
            text.encode()

    def test_nulls_among_several_golds_are_left_out(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", {"question": "?", "answer": [None, "a  b"], "solution": None})
        assert load("workload=jsonl", f"workload.path={path}", "workload.solution=solution")[0].gold == "a b"

    def test_what_is_not_graded_needs_no_gold(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", {"question": "?", "answer": None})
        (problem,) = load("workload=jsonl", f"workload.path={path}", "workload.grader=none")
        assert (problem.gold, problem.error) == ("", None)

    def test_ids_are_unique(self, tmp_path):
        path = write_lines(tmp_path / "q.jsonl", *[{"id": 1, "question": "1+1", "answer": "2"}] * 2)
        with pytest.raises(UsageError, match="'1' names two items"):
            load("workload=jsonl", f"workload.path={path}", "workload.id=id")


class TestHub:
    def test_data_set_is_read_by_the_library(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        datasets.disable_progress_bars()
        folder = tmp_path / "set"
        folder.mkdir()
        write_lines(folder / "test.jsonl", {"question": "1+1", "answer": "one and one\n#### 2"})
        write_lines(folder / "train.jsonl", {"question": "2+2", "answer": "#### 4"})
        problems = load("workload=gsm8k", f"workload.hub_id={folder}", "workload.subset=null")
        assert [(p.question, p.gold) for p in problems] == [("1+1", "2")]

    def test_what_is_not_there_is_named(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        with pytest.raises(UsageError) as caught:
            load("workload=gsm8k", f"workload.hub_id={tmp_path}/nothing")
        assert "give a local file with workload.path=FILE" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_numbers_of_steps_are_balanced():
    steps = [n for n, _ in KINDS.values()]
    assert len(steps) >= 36
    assert math.isclose(steps.count(1), steps.count(2), abs_tol=6)


def test_reasoning_gym_items_become_problems(monkeypatch):
    asked = []

    def create_dataset(task, size, seed):
        asked.append((task, size, seed))
        if task != "gsm_symbolic":
            raise ValueError(f"Dataset '{task}' not registered")
        return [{"question": f"{i} + {seed}?", "answer": str(i + seed)} for i in range(size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    config = load_experiment(["workload=reasoning_gym", "workload.seed=3", "workload.options.count=5"]).workload
    problems = load_problems(config)
    assert asked == [("gsm_symbolic", 5, 3)]
    assert [(p.question, p.gold, p.kind) for p in problems][1] == ("1 + 3?", "4", "gsm_symbolic")
    with pytest.raises(UsageError, match=r"workload\.options\.task=nope: Dataset 'nope' not registered"):
        load_problems(load_experiment(["workload=reasoning_gym", "workload.options.task=nope"]).workload)


def test_reasoning_gym_that_is_absent_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[reasoning-gym\]'"):
        load_problems(load_experiment(["workload=reasoning_gym"]).workload)
