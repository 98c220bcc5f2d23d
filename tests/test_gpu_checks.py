"""The runner of the GPU's checks: every check has a verdict, whatever becomes of the others. No GPU is needed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.gpu import __main__ as runner
from tests.gpu.pairwise import pairwise

HEAD = {"commit": "abc"}


@dataclass(frozen=True)
class Fake(runner.Check):
    """A check that is a few lines of Python."""

    code: str = ""

    def command(self, out, commit, full):
        return [sys.executable, "-c", self.code, str(out), commit, str(full)]


def fake(name, code, **options) -> Fake:
    return Fake(name, "", code=code, **options)


CHECKS = [
    fake("good", "import sys; print('noise'); print('3 of 3', *sys.argv[2:])"),
    fake("wrong", "print('2 of 3'); raise SystemExit(1)"),
    fake("raises", "import nowhere"),
    fake("dies", "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"),
    fake("hangs", "import time; print('waiting', flush=True); time.sleep(60)", limit=1.0),
    fake("usage", "raise SystemExit(2)"),
    fake("last", "print('done')", alone=True),
]


def read(path):
    record = json.loads(path.read_text())
    return record, {row.pop("check"): row for row in record["checks"]}


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_check_that_ends_badly_has_failed_and_the_others_run(tmp_path, capfd, jobs):
    out = tmp_path / "new" / "record.json"
    assert not runner.run_checks(CHECKS, out, HEAD, jobs=jobs)
    record, rows = read(out)
    assert (record["commit"], record["passed"]) == ("abc", False)
    assert record["seconds"] < 30
    verdicts = {name: (row["verdict"], row["summary"]) for name, row in rows.items()}
    assert verdicts == {
        "good": ("passed", "3 of 3 abc False"),
        "wrong": ("failed", "2 of 3"),
        "raises": ("failed", "ModuleNotFoundError: No module named 'nowhere'"),
        "dies": ("failed", "killed by signal 9: so far"),
        "hangs": ("failed", "killed after 1 s: waiting"),
        "usage": ("failed", "exit status 2: no output"),
        "last": ("passed", "done"),
    }
    assert "raises | ModuleNotFoundError" in capfd.readouterr().out


def test_checks_take_turns_with_gpus_and_those_that_must_be_alone_have_one_each(tmp_path):
    say = "import os, time; time.sleep(0.5); print(os.environ.get('CUDA_VISIBLE_DEVICES'), time.monotonic())"
    checks = [fake("wide", say, gpus=2), *(fake(f"beside {i}", say) for i in range(3))]
    checks += [fake(f"alone {i}", say, alone=True) for i in range(3)]
    assert runner.run_checks(checks, tmp_path / "record.json", HEAD, jobs=4, gpus=["5", "7"])
    said = {name: row["summary"].split() for name, row in read(tmp_path / "record.json")[1].items()}
    assert said["wide"][0] == str(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert [said[f"beside {i}"][0] for i in range(3)] == ["5", "7", "5"]
    assert {said["alone 0"][0], said["alone 1"][0]} == {"5", "7"}
    assert float(said["alone 2"][1]) >= min(float(said[f"alone {i}"][1]) for i in range(2)) + 0.4


def test_only_if_all_pass_the_verdict_is_passed(tmp_path):
    out = tmp_path / "record.json"
    assert runner.run_checks([CHECKS[0], CHECKS[-1]], out, HEAD)
    assert read(out)[0]["passed"] is True


def test_the_record_is_written_as_verdicts_come(tmp_path):
    out = tmp_path / "record.json"
    waits = f"""
import json, time
rows = lambda: [row["verdict"] for row in json.load(open({str(out)!r}))["checks"]]
while rows() != ["passed", "not run"]: time.sleep(0.05)
"""
    assert runner.run_checks([fake("first", "print(1)"), fake("second", waits, alone=True)], out, HEAD, seconds=30)


def test_what_has_no_time_left_has_failed(tmp_path):
    out = tmp_path / "record.json"
    sleeps = fake("sleeps", "import time; time.sleep(60)")
    assert not runner.run_checks([sleeps, fake("late", "print(1)", alone=True)], out, HEAD, seconds=1.0)
    rows = read(out)[1]
    assert rows["sleeps"]["summary"].startswith("killed after 1 s")
    assert (rows["late"]["verdict"], rows["late"]["summary"]) == ("failed", "not begun: no time was left")


def test_an_interruption_ends_what_runs_and_what_it_started(tmp_path):
    """The grandchild too; what was not finished has no verdict, and so the whole has not passed."""
    started = tmp_path / "pid"
    child = f"""
import pathlib, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(started)!r}).write_text(str(process.pid))
process.wait()
"""
    parent = f"""
import signal, sys
from pathlib import Path
from tests.test_gpu_checks import fake, runner
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
runner.run_checks([fake("one", {child!r}), fake("two", "print(2)")], Path({str(tmp_path / "record.json")!r}), {HEAD!r})
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=runner.ROOT)
    while not started.exists() or not started.read_text():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    rows = read(tmp_path / "record.json")[1]
    assert [row["verdict"] for row in rows.values()] == ["not run", "not run"]
    deadline = time.monotonic() + 10
    while alive(int(started.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(started.read_text()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_all_sections_of_all_modules_are_run():
    from tests.gpu import check_compressed_engine, check_engine, check_kernels

    names = [check.name for check in runner.CHECKS]
    assert len(set(names)) == len(names)
    for module, sections in {
        check_kernels: check_kernels.PARTS,
        check_engine: check_engine.SECTIONS,
        check_compressed_engine: check_compressed_engine.SECTIONS,
    }.items():
        mine = [check.arguments[1] for check in runner.CHECKS if check.module == module.__name__]
        assert sorted(",".join(mine).split(",")) == sorted(sections)
    assert runner.COMPRESSION in [check.module for check in runner.CHECKS]


FACTORS = (range(3), range(2), range(5), range(4))


def test_pairwise_brings_any_two_values_together_in_few_combinations():
    rows = pairwise(*FACTORS)
    for i, j in combinations(range(len(FACTORS)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(FACTORS[i], FACTORS[j]))
    assert len(rows) < 30 < len(list(product(*FACTORS)))
    assert pairwise("ab") == [("a",), ("b",)]
    assert sorted(pairwise("ab", [1, 2])) == list(product("ab", [1, 2]))
