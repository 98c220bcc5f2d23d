"""What hostile programs can't do to the grader of programs and to its machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.graders import code
from tests.experiments.graders.graded_programs import (
    ADD,
    DOUBLE,
    _small_limits,  # noqa: F401
    needs_namespaces,
    sandbox,
    score,
)

CHANNEL = "import sys\n    channel = sys._getframe().f_back.f_locals['channel']"
FORGED = (
    b"\x80\x02ccollections\nCounter\nN}X\x06\x00\x00\x00__eq__cbuiltins\nstr\ns\x86b0"  # Counter.__eq__ = str
    b"\x88ccollections\nCounter\n)R\x86."  # (True, Counter())
)
"""A value that equals all others, as pickle would let a program send it."""

ROOT = Path(__file__).parents[3]


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
            "class Evil(int):\n        def __reduce__(self): return (print, ('x',))\n    return Evil()",
            "import os\n    os.write(3, b'\\x80\\x04.' * 1000)\n    return 3",
            "import os\n    os.close(3)",
            "import sys\n    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
            "    frame.f_locals['exam'].clear()\n    return True",
            "import gc, types\n    [f.__globals__.update(check=lambda c: 0) for f in gc.get_objects()"
            " if isinstance(f, types.FunctionType)]",
            "return (lambda x: (x.append(x), x))([])",
            f"{CHANNEL}\n    channel.write({FORGED!r})\n    channel.flush()\n"
            "    import collections\n    return collections.Counter()",
            *(
                f"{CHANNEL}\n    channel.write(({line!r} + bytes([10])) * 3)\n    channel.flush()"
                for line in (
                    b'[true, {"Counter": [["__eq__", 1]]}, []]',
                    b'[true, {"object": []}, []]',
                    b"[true, 3]",
                    b'[true, {"ndarray": ["O", [3]]}, []]',
                    b'[true, {"iterator": 3}, []]',
                    b"[true, 4, 3]",
                    b'[true, {"__class__": "int"}, []]',
                    b'[true, {"int": "3", "float": "0"}, []]',
                    b'[true, {"Decimal": "sNaN"}, []]',
                    b"[true, NaN, []]",
                    b'[false, "SystemExit", []]',
                    b"3",
                    b"[" * 100_000,
                )
            ),
            "return 10 ** 10 ** 10",
            "import time\n    time.sleep(60)",
        ],
    )
    def test_only_right_values_pass(self, body, monkeypatch):
        monkeypatch.setattr(code, "SANDBOX", sandbox(seconds=0.8))
        assert score(f"def add(a, b):\n    {body}", ADD) == 0

    def test_no_exception_ends_the_tests(self):
        test = "def check(f):\n    assert all(map(lambda x: f(x) == x, [1, 2]))\n"
        gold = json.dumps({"setup": "", "entry_point": "f", "test": test})
        assert score("def f(x):\n    raise StopIteration", gold) == 0
        assert score("def f(x):\n    return x", gold) == 1

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
        given = [Path(path).resolve() for path in (sys.executable, sys.base_prefix, np.__file__)]
        python = sorted({path.parts[2] for path in given if path.is_relative_to("/tmp")})  # where it is installed there
        assert self.see(program).splitlines() == [
            f"['HOME', 'LC_CTYPE', 'OMP_NUM_THREADS'] /tmp {python} False False",
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

    def test_nothing_survives_the_death_of_its_watch(self):
        mark = f"watched-{os.getpid()}-{time.monotonic_ns()}"
        program = f"import os, sys\nos.execv(sys.executable, ['python', '-c', 'import time; time.sleep(9)', {mark!r}])"
        deadline = time.monotonic() + 8
        with code.SANDBOX.start({"main.py": program}) as running:
            while not processes(mark):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            running.process.kill()
        while processes(mark):
            assert time.monotonic() < deadline, "it ran on"
            time.sleep(0.02)

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
