"""The shipped workloads load items of their data sets, from files and by the library that reads the hub."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections import Counter
from pathlib import Path

import pytest

from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.graders import GRADERS
from experiments.workloads import exams, load_problems
from tests.experiments.graders.graded_programs import REFUSED, needs_namespaces

HUMANEVAL = {
    "task_id": "Mine/0",
    "prompt": "def double(x: int) -> int:\n    '''Twice x.'''\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    "entry_point": "double",
}


def packed(cases: list[dict]) -> str:
    """Hidden cases as LiveCodeBench writes them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


CONTEST = {
    "question_id": "q1",
    "question_content": "Print twice the number.",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
METHOD = CONTEST | {
    "starter_code": "class Solution:\n    def add(self, a, b):",
    "public_test_cases": json.dumps([{"input": "1\n[2]", "output": "[1, 2]", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "3\n[]", "output": "[3]", "testtype": "functional"}]),
    "metadata": '{"func_name": "add"}',
}
ITEMS = {
    "humaneval": HUMANEVAL,
    "livecodebench_generation": CONTEST,
    "livecodebench_execution": {"code": "def f(x):\n    return x", "input": "f(3)", "output": "3"},
    "aime24": {"id": 0, "problem": "What is 200 + 4?", "answer": "204"},
    "aime25": {"problem": "What is 200 + 4?", "answer": "204"},
    "amc23": {"question": "What is 20 + 7?", "answer": 27.0},
    "multifieldqa": {"_id": "m", "context": "Ada lives in Ulm.", "input": "Where?", "answers": ["Ulm", "in\nUlm"]},
    "gsm8k": {"question": "What is 1 + 1?", "answer": "One more.\n#### 2"},
    "math500": {"problem": "Half?", "solution": "It is \\boxed{\\frac{1}{2}}.", "answer": "0.5"},
}
GOOD = {
    "humaneval": "```python\ndef double(x):\n    return x + x\n```",
    "livecodebench_generation": "```python\nprint(2 * int(input()))\n```",
    "livecodebench_execution": "It is three.\n[ANSWER]\n3\n[/ANSWER]",
    "aime24": "\\boxed{204}",
    "aime25": "\\boxed{204}",
    "amc23": "\\boxed{27}",
    "multifieldqa": "In Ulm.",
    "gsm8k": "The answer is 2",
    "math500": "\\boxed{0.5}",
}


def write(path: Path, *items: dict) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def load(*options: str):
    return load_problems(load_experiment(options).workload)


@pytest.mark.parametrize("name", ITEMS)
def test_items_load_from_a_file_and_by_the_library_alike(name, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set" / "test.jsonl", ITEMS[name])
    from_file = load(f"workload={name}", f"workload.path={path}")
    assert load(f"workload={name}", f"workload.hub_id={path.parent}", "workload.subset=null") == from_file
    workload = load_experiment([f"workload={name}"]).workload
    prompt = workload.template.replace("{question}", from_file[0].question)
    assert "{" not in prompt.replace("boxed{}", "")
    if workload.grader == "code" and REFUSED:
        pytest.skip(REFUSED)
    score, _ = GRADERS[workload.grader](GOOD[name], from_file[0].gold)
    assert score == 1
    assert GRADERS[workload.grader]("I don't know", from_file[0].gold)[0] == 0


def test_samples_and_lengths_are_those_of_the_paper():
    wanted = {
        "amc23": (32, 16384),
        "aime24": (32, 32768),
        "livecodebench_generation": (8, 16384),
        "gsm8k_amc23": (4, 16384),
        "multifieldqa": (4, 4096),
    }
    for name, expected in wanted.items():
        sampling = load_experiment([f"workload={name}"]).sampling
        assert (sampling.n, sampling.max_tokens) == expected, name


def test_parts_are_mixed(tmp_path):
    grade_school = write(tmp_path / "g.jsonl", *[{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(20)])
    contest = write(tmp_path / "a.jsonl", *[{"question": f"{i} + 2?", "answer": i + 2} for i in range(5)])
    options = [
        "workload=gsm8k_amc23",
        f"workload.parts.gsm8k.path={grade_school}",
        f"workload.parts.amc23.path={contest}",
    ]
    problems = load(*options)
    assert len({p.id for p in problems}) == 25
    kinds = [p.kind for p in problems]
    assert (kinds.count("gsm8k"), kinds.count("amc23")) == (20, 5)
    assert kinds != sorted(kinds) != kinds[::-1]
    assert load(*options) == problems != load(*options, "workload.seed=1")
    with pytest.raises(UsageError, match=r"workload\.parts\.amc23: .*pth"):
        load(*options, "workload.parts.amc23.pth=x")


@needs_namespaces
def test_methods_are_tested_by_calls():
    config = load_experiment(["workload=livecodebench_generation"]).workload
    gold = exams.exam(METHOD, 0, config)
    grade = GRADERS["code"]
    assert grade("class Solution:\n    def add(self, a: int, b: List[int]):\n        return [a] + b", gold)[0] == 1
    assert grade("class Solution:\n    def add(self, a, b):\n        return (a, *b)", gold)[0] == 1
    assert grade("class Solution:\n    def add(self, a, b):\n        return [1, 2]", gold)[0] == 0


def test_tests_beyond_the_bound_are_left_out_and_said(monkeypatch, caplog):
    monkeypatch.setattr(exams, "TEST_BYTES", 20)
    config = load_experiment(["workload=jsonl", "workload.path=x", "workload.tests=pairs"]).workload
    gold = exams.exam({"tests": [["x" * 50, "1"], ["2", "3"], ["4", "5"]]}, 7, config)
    assert json.loads(gold)["tests"] == [["2", "3"], ["4", "5"]]
    assert caplog.messages == ["item 7: 1 of 3 tests left out, too large"]


@pytest.mark.parametrize(
    ("item", "line"),
    [
        ({"private_test_cases": "nonsense!"}, "workload.tests=livecodebench: the tests of item 0 can't be read"),
        ({"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()}, "workload.tests="),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "workload.tests=livecodebench: the tests of item 0"),
        ({"public_test_cases": "[{}]"}, "workload.tests=livecodebench: item 0 has no field 'input'"),
        ({"private_test_cases": "[" * 100_000}, "workload.tests=livecodebench: the tests of item 0 can't be read"),
        ({"metadata": "[]"}, "workload.tests=livecodebench: the tests of item 0 can't be read"),
    ],
)
def test_unreadable_tests_are_named(tmp_path, item, line):
    path = write(tmp_path / "q.jsonl", CONTEST | item)
    with pytest.raises(UsageError) as caught:
        load("workload=livecodebench_generation", f"workload.path={path}")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_data_file_can_change_nothing(tmp_path):
    """Pickle lets data set an attribute of a class, such as how it compares."""
    state = b"ccollections\nCounter\nN}X\x06\x00\x00\x00forgedX\x03\x00\x00\x00yess\x86b0"
    pickled = b"\x80\x02" + state + pickle.dumps(json.dumps([]), protocol=0)
    item = CONTEST | {"private_test_cases": base64.b64encode(zlib.compress(pickled)).decode()}
    with pytest.raises(UsageError, match=r"item 0 can't be read \(collections\.Counter is not text\)"):
        load("workload=livecodebench_generation", f"workload.path={write(tmp_path / 'q.jsonl', item)}")
    assert not hasattr(Counter, "forged")


def test_hidden_tests_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(exams, "PRIVATE_BYTES", 1000)
    item = CONTEST | {"private_test_cases": packed([{"input": "x" * 2000, "output": "6\n"}])}
    with pytest.raises(UsageError, match=r"item 0 can't be read \(more than 1000 bytes\)"):
        load("workload=livecodebench_generation", f"workload.path={write(tmp_path / 'q.jsonl', item)}")


def test_format_of_tests_is_known(tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "?", "answer": "1"})
    with pytest.raises(UsageError, match=r"workload\.tests=mine: must be one of humaneval, livecodebench, pairs"):
        load("workload=jsonl", f"workload.path={path}", "workload.tests=mine")


def test_question_of_several_fields_names_a_missing_one(tmp_path):
    path = write(tmp_path / "q.jsonl", {"a": "1", "answer": "1"})
    question = "workload.question='{a} and {b}'"
    with pytest.raises(UsageError, match=r"workload\.question=b: item 0 has no such field; it has a, answer"):
        load("workload=jsonl", f"workload.path={path}", question)
