"""The grader of programs: what passes, and what hostile programs can't do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from experiments.errors import UsageError
from experiments.graders import code, get_grader, grade
from experiments.graders.code import extract_program, same_output
from experiments.sandbox import Limits, Sandbox

REFUSED = Sandbox().check()
needs_namespaces = pytest.mark.skipif(REFUSED is not None, reason=f"no sandbox here: {REFUSED}")

ADD = json.dumps(
    {
        "setup": "from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    '''The sum.'''\n",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-5, 5) == 0\n",
    }
)
DOUBLE = json.dumps({"tests": [["2\n", "4\n"], ["21\n", "42\n"]]})


ROOT = Path(__file__).parents[2]


def processes(mark: str) -> list[str]:
    """The processes of this machine with a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue  # it ended
    return found


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(code, "SANDBOX", sandbox(seconds=5))


def sandbox(seconds: float) -> Sandbox:
    limits = Limits(seconds=seconds, memory=256 << 20, processes=8, file_size=1 << 20, disk=4 << 20)
    return Sandbox(limits)


def score(answer: str, gold: str) -> float | None:
    graded = grade(code.grade_code, answer, gold)
    assert graded.error is None, graded
    return graded.score


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
            "    for x in (None, True, 1, 2.5, 1j, float('inf'), 'ä', b'x', (1, [2]), {3: {4}}, frozenset({5})):\n"
            "        assert f(x) == x and type(f(x)) is type(x)\n"
            "    try:\n        f(KeyError)\n    except KeyError:\n        return\n    assert False\n"
        )
        gold = json.dumps({"setup": "", "entry_point": "f", "test": test.replace("f(KeyError)", "f('raise')")})
        answer = "def f(x):\n    if x == 'raise': raise KeyError(x)\n    return x"
        assert score(answer, gold) == 1

    def test_test_may_use_what_the_setup_defines(self):
        setup = "import math\ndef square(x):\n    return x * x\ndef root(x):\n    '''Its root.'''\n"
        test = "def check(candidate):\n    assert math.isclose(square(candidate(2)), 2)\n"
        gold = json.dumps({"setup": setup, "entry_point": "root", "test": test})
        assert score("def root(x):\n    return math.sqrt(x)", gold) == 1


@needs_namespaces
class TestHostilePrograms:
    @pytest.mark.parametrize(
        "program",
        [
            "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
            "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
            "while True: pass",
            "import time\ntime.sleep(60)",
            "x = bytearray(1 << 40)",
            "x = []\nwhile True: x.append(bytearray(1 << 20))",
            "while True: print('x' * 100_000)",
            "import os\nos._exit(0)",
            "raise SystemExit(0)",
            "import os\nos.abort()",
            "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)\nos._exit(0)",
            "print('passed'); print('ok'); import sys; sys.exit(0)",
            "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
            "\0",
            "\ud800",
        ],
    )
    def test_score_0_and_end_soon(self, program, monkeypatch):
        monkeypatch.setattr(code, "SANDBOX", sandbox(seconds=0.4))
        begin = time.monotonic()
        assert score(program, ADD) == 0
        assert score(program, DOUBLE) == 0
        assert time.monotonic() - begin < 5

    @pytest.mark.parametrize(
        "body",
        [
            "class Same(int):\n        __eq__ = lambda self, other: True\n    return Same()",
            "import pickle\n    class Evil:\n        def __reduce__(self): return (print, ('x',))\n    return Evil()",
            "import os\n    os.write(3, b'\\x80\\x04.' * 1000)\n    return 3",
            "import os\n    os.close(3)",
            "import sys\n    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
            "    frame.f_locals['exam'].clear()\n    return True",
            "import gc, types\n    [f.__globals__.update(check=lambda c: 0) for f in gc.get_objects()"
            " if isinstance(f, types.FunctionType)]",
            "return (lambda x: (x.append(x), x))([])",
            "return 10 ** 10 ** 10",
            "import time\n    time.sleep(60)",
        ],
    )
    def test_only_right_values_pass(self, body, monkeypatch):
        monkeypatch.setattr(code, "SANDBOX", sandbox(seconds=0.8))
        assert score(f"def add(a, b):\n    {body}", ADD) == 0

    def test_expected_values_are_nowhere_to_be_found(self):
        program = (
            "import os\n"
            "found = [open(os.path.join(d, f)).read() for d, _, fs in os.walk('/box') for f in fs]\n"
            "add = lambda a, b: a + b if any('-5' + ', 5)' in text for text in found) else None"
        )
        assert score(program, ADD) == 0

    def see(self, program: str) -> str:
        """What a program prints, by way of a test that is meant to fail."""
        with tempfile.TemporaryFile() as output:
            with code.SANDBOX.start({"main.py": program}, stdout=output) as running:
                running.wait()
            output.seek(0)
            return output.read().decode()

    def test_sees_neither_environment_nor_files_nor_processes_nor_network(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SECRET", "key")
        (tmp_path / "file").write_text("text")
        program = f"""
import os, socket, sys
print(sorted(os.environ), os.getcwd(), os.listdir(), os.path.exists({str(tmp_path)!r}), os.path.exists("/proc/1"))
print(os.path.exists({os.path.expanduser("~/.bashrc")!r}), os.path.exists("/etc/passwd"), os.getpid())
for path in ("/usr/x", "/box/x", {str(tmp_path / "file")!r}):
    try:
        open(path, "w")
    except OSError as error:
        print(error.strerror)
for address in (("127.0.0.1", 9), ("8.8.8.8", 53)):
    try:
        socket.create_connection(address, timeout=1)
    except OSError as error:
        print(error.strerror)
print([name for name in sys.path if "site-packages" in name])
"""
        assert self.see(program).splitlines() == [
            "['HOME', 'LC_CTYPE', 'OMP_NUM_THREADS'] /tmp [] False False",
            "False False 1",
            "Read-only file system",
            "Read-only file system",
            "No such file or directory",
            "Network is unreachable",
            "Network is unreachable",
            "[]",
        ]
        assert (tmp_path / "file").read_text() == "text"

    def test_files_in_memory_are_bounded(self):
        program = """
written = 0
try:
    for number in range(100):
        with open(f"/tmp/{number}", "wb", buffering=0) as file:
            written += file.write(bytes(1 << 20))
except OSError as error:
    print(written >> 20 < 5, error.strerror)
"""
        assert self.see(program) == "True No space left on device\n"

    def test_what_was_left_behind_is_gone(self):
        mark = f"left-{os.getpid()}-{time.monotonic_ns()}"
        program = f"""
import os, sys, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, ["python", "-c", "import time; time.sleep(60)", {mark!r}])
        os._exit(0)
time.sleep(0.2)
print(2 * int(input()))
"""
        assert score(program, DOUBLE) == 1
        assert not processes(mark)

    def test_exceptions_at_exit_change_nothing(self):
        program = (
            "import atexit\natexit.register(lambda: 1 / 0)\ndef add(a, b): return a + b\nprint(2 * int(input() or 0))"
        )
        assert score(program, DOUBLE) == 1

    def test_nothing_survives_the_death_of_the_grading_process(self, tmp_path):
        mark = f"survivor-{os.getpid()}-{time.monotonic_ns()}"
        program = f"import os, sys\nos.execv(sys.executable, ['python', '-c', 'import time; time.sleep(50)', {mark!r}])"
        grading = "import sys; from experiments.graders.code import grade_code; grade_code(sys.stdin.read(), '{}')"
        grading = grading.format(DOUBLE.replace("\\", "\\\\"))
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        child = subprocess.Popen([sys.executable, "-c", grading], cwd=ROOT, stdin=subprocess.PIPE, env=environment)
        child.stdin.write(program.encode())
        child.stdin.close()
        deadline = time.monotonic() + 8
        while not processes(mark):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        while processes(mark):
            assert time.monotonic() < deadline, "it ran on"
            time.sleep(0.02)


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
    ],
)
def test_outputs_are_compared_by_words(output, expected, same):
    assert same_output(output, expected) is same
