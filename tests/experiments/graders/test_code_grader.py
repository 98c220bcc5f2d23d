"""The grader of programs: what passes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from experiments.errors import UsageError
from experiments.graders import code, get_grader, grade
from experiments.graders.code import extract_program, same_output
from experiments.sandbox import Limits, Sandbox
from experiments.workloads.exams import COMMON_IMPORTS
from tests.experiments.graders.graded_programs import (
    ADD,
    DOUBLE,
    _small_limits,  # noqa: F401
    needs_namespaces,
    score,
)


@needs_namespaces
class TestPrograms:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("def add(a, b):\n    return a + b", 1),
            ("Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", 1),
            ("```\ndef add(a, b):\n    return 0\n```\nNo:\n```py\ndef add(a, b):\n    return a + b\n", 1),
            ("    return a + b\n", 1),
            ("class Solution:\n    def add(self, a, b):\n        return a + b", 1),
            (
                "print('hi')\ndef add(a, b):\n    print('noise')\n    return a + b\nif __name__ == '__main__': 1 / 0",
                1,
            ),
            ("def add(a, b):\n    return a - b", 0),
            ("def add(a, b):\n    raise ValueError", 0),
            ("def add(a, b:", 0),
            ("def plus(a, b):\n    return a + b", 0),
            ("I can't.", 0),
            ("", 0),
        ],
    )
    def test_functions(self, answer, expected):
        assert score(answer, ADD) == expected

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("print(2 * int(input()))", 1),
            ("import sys\nprint(f'{2 * float(sys.stdin.read()):.3f}  ')", 1),
            ("print(4)", 0),
            ("print(2 * int(input()))\nraise SystemExit(1)", 0),
            ("pass", 0),
        ],
    )
    def test_input_and_output(self, answer, expected):
        assert score(answer, DOUBLE) == expected

    def test_values_of_all_plain_kinds_arrive(self):
        test = (
            "def check(f):\n"
            "    from collections import Counter, OrderedDict, defaultdict, deque\n"
            "    from decimal import Decimal\n"
            "    from fractions import Fraction\n"
            "    for x in (None, True, 1, -0.0, 2.5, 1j, float('inf'), 'ä\\ud800', b'x', bytearray(b'y'), (1, [2]),\n"
            "              {3: {4}, (5,): 6}, frozenset({5}), 1 << 63, -7 ** 9999, range(9), deque([1], 2),\n"
            "              Counter('aab'), OrderedDict(a=1), defaultdict(None, a=1), {'tuple': [1]},\n"
            "              Decimal('1.50'), Fraction(1, 3)):\n"
            "        assert f(x) == x and type(f(x)) is type(x)\n"
            "    assert [str(f(x)) for x in (-0.0, Decimal('1.50'), float('nan'))] == ['-0.0', '1.50', 'nan']\n"
            "    try:\n        f(KeyError)\n    except KeyError:\n        return\n    assert False\n"
        )
        gold = json.dumps({"setup": "", "entry_point": "f", "test": test.replace("f(KeyError)", "f('raise')")})
        answer = "def f(x):\n    if x == 'raise': raise KeyError(x)\n    return x"
        assert score(answer, gold) == 1

    @pytest.mark.parametrize(
        ("returned", "check"),
        [
            ("(y for y in [x, x])", "list(f(2)) == [2, 2]"),
            ("map(str, [x])", "list(f(2)) == ['2']"),
            ("{1: x}.keys()", "set(f(2)) == {1}"),
            ("{1: x}.values()", "sum(f(2)) == 2"),
            ("{1: x}.items()", "dict(f(2)) == {1: 2}"),
            ("__import__('numpy').array([[x, 1.5]])", "(f(2) == [[2, 1.5]]).all() and f(2).shape == (1, 2)"),
        ],
    )
    def test_iterators_views_and_arrays_arrive(self, returned, check):
        gold = {"setup": "", "entry_point": "f", "test": f"def check(f):\n    assert {check}\n"}
        assert score(f"def f(x):\n    return {returned}", json.dumps(gold)) == 1

    @pytest.mark.parametrize(
        ("argument", "program", "after"),
        [
            ("[2, 1]", "x.sort()", "[1, 2]"),
            ("[[1], [2]]", "x[1].append(x.pop(0))", "[[2, [1]]]"),
            ("{1: 2}", "x[3] = x.pop(1)", "{3: 2}"),
            ("{1}", "x.clear()", "set()"),
            ("bytearray(b'ab')", "x.reverse()", "b'ba'"),
        ],
    )
    def test_what_is_done_to_an_argument_in_place_arrives(self, argument, program, after):
        test = f"def check(f):\n    a = {argument}\n    f(a)\n    assert a == {after}\n"
        gold = json.dumps({"setup": "", "entry_point": "f", "test": test})
        assert score(f"def f(x):\n    {program}", gold) == 1
        assert score("def f(x):\n    pass", gold) == 0

    @pytest.mark.parametrize(
        ("program", "check"), [("def f(g): return g(2)", "f(abs) == 2"), ("def f(g): return object()", "f(2)")]
    )
    def test_what_can_not_be_exchanged_is_a_fault_of_the_grader(self, program, check):
        gold = {"setup": "", "entry_point": "f", "test": f"def check(f):\n    assert {check}\n"}
        graded = grade(get_grader("code", allow_code_execution=True), program, json.dumps(gold))
        assert graded.score == 0
        assert "what is not a plain value" in graded.error

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            ("__import__('collections').namedtuple('Pair', 'a b')(1, 2)", "(1, 2)"),
            ("__import__('collections').defaultdict(lambda: 0, a=1)", "{'a': 1}"),
            ("type('Number', (int,), {})(3)", "3"),
        ],
    )
    def test_a_subclass_is_what_it_extends(self, value, wanted):
        gold = {"setup": "", "entry_point": "f", "test": f"def check(f):\n    assert f() == {wanted}\n"}
        assert score(f"def f():\n    return {value}", json.dumps(gold)) == 1

    def test_test_may_use_what_the_setup_defines(self):
        setup = "import math\ndef square(x):\n    return x * x\ndef root(x):\n    '''Its root.'''\n"
        test = "def check(candidate):\n    assert math.isclose(square(candidate(2)), 2)\n"
        gold = json.dumps({"setup": setup, "entry_point": "root", "test": test})
        assert score("def root(x):\n    return math.sqrt(x)", gold) == 1

    @pytest.mark.parametrize(
        "program",
        [
            "print(pow(2, -1, 7))",
            "print(bisect.bisect_left([1, 2, 3, 4, 5], 5) + bisect_left([1, 3], 0))",
            "print(4)\nquit()",
            "print(4)\nexit(0)\n1 / 0",
            '"""About."""\nfrom __future__ import annotations\ndef f(x: Undefined): return 4\nprint(f(1))',
            "assert Counter is collections.Counter and OrderedDict is collections.OrderedDict\nprint(4)",
            "class A:\n    pass\nimport pickle\nassert type(pickle.loads(pickle.dumps(A()))) is A\nprint(4)",
            "if __name__ == '__main__': print(4)",
        ],
    )
    def test_what_contest_sites_give(self, program):
        assert score(program, json.dumps({"setup": COMMON_IMPORTS, "tests": [["", "4\n"]]})) == 1

    @pytest.mark.parametrize("documented", [False, True])
    def test_imports_from_the_future(self, documented):
        program = "from __future__ import annotations\ndef add(a: x, b: y): return a + b"
        if documented:
            program = f'"""About."""\n\n{program}'
        assert score(program, ADD) == 1
        setup = '"""Mine."""\nfrom __future__ import division'
        assert score(program, json.dumps(json.loads(ADD) | {"setup": setup})) == 1
        assert score(f"import math\n{program}", ADD) == 0

    @pytest.mark.parametrize("end", ["exit(1)", "quit('no')", "__builtins__.exit = None; exit(0)"])
    def test_bad_ends(self, end):
        assert score(f"print(4)\n{end}", json.dumps({"tests": [["", "4"]]})) == 0

    def test_numpy_is_there_as_in_the_harness(self, monkeypatch):
        monkeypatch.setattr(code, "SANDBOX", Sandbox())
        assert score("import numpy as np\ndef add(a, b): return np.array([a, b]).sum()", ADD) == 1
        four = json.dumps({"tests": [["", "4"]]})
        assert score("import numpy as np\nprint(np.linalg.inv(np.eye(2) / 2).sum())", four) == 1
        assert score("import torch\nprint(4)", four) == 0

    def test_each_case_has_its_time_and_all_together_theirs(self, monkeypatch):
        slow = "import time\ndef f(x):\n    time.sleep(x)\n    return x"

        def calls(*seconds: float) -> str:
            test = f"def check(f):\n    for x in {seconds}:\n        assert f(x) == x\n"
            return json.dumps({"setup": "", "entry_point": "f", "test": test})

        reads = "import time\nx = float(input())\ntime.sleep(x)\nprint(x)"
        inputs = json.dumps({"tests": [["0.5", "0.5"]] * 4})
        monkeypatch.setattr(code, "SANDBOX", Sandbox(Limits(seconds=1.5, suite_seconds=30)))
        assert score(slow, calls(0.5, 0.5, 0.5, 0.5)) == 1
        caught = "def check(f):\n    try:\n        f(2.0)\n    except BaseException:\n        pass\n"
        assert score(slow, json.dumps({"setup": "", "entry_point": "f", "test": caught})) == 0
        monkeypatch.setattr(code, "SANDBOX", Sandbox(Limits(seconds=1.5, suite_seconds=1.5)))
        assert score(slow, calls(0.5, 0.5, 0.5, 0.5)) == 0
        assert score(reads, inputs) == 0


def test_execution_needs_consent():
    with pytest.raises(
        UsageError, match=r"would run the Python programs.*workload\.allow_code_execution=true allows it"
    ):
        get_grader("code")


def test_without_a_sandbox_nothing_runs(monkeypatch):
    monkeypatch.setattr(Sandbox, "check", lambda self: "unshare: Operation not permitted")
    with pytest.raises(UsageError, match=r"there is no sandbox here \(unshare: Operation not permitted\)"):
        get_grader("code", allow_code_execution=True)


@pytest.mark.parametrize("gold", ["", "[]", "{}", '{"test": "x"}'])
def test_gold_without_tests_is_a_fault_of_the_grader(gold):
    graded = grade(code.grade_code, "print(1)", gold)
    assert graded.score == 0
    assert graded.error is not None


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1"),
        ("```\nx = 1\n```\n\n```\ny = 2\n```", "y = 2"),
        ("```python\nx = 1", "x = 1"),
        ("```python\nx = '''\n```", "x = '''"),
        ("", ""),
    ],
)
def test_program_is_the_last_block(answer, program):
    assert extract_program(answer).strip() == program


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True),
        ("1 2", "1\n2", False),
        ("1.50", "1.5", True),
        ("yes", "Yes", False),
        ("nan", "nan", True),
        ("inf", "Infinity", False),
        ("", "", True),
        ("", "0", False),
        ("4_1", "41", False),
        ("٤١", "41", False),
        ("+.5e1", "5.", True),
        ("1e999999999999999999", "1", False),
        ("1e99999999999999999999", "1", False),
        ("1" * 100_000 + "x", "1", False),
    ],
)
def test_outputs_are_compared_by_words(output, expected, same):
    assert same_output(output, expected) is same
