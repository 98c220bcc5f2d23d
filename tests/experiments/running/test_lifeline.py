"""What a killed process started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.running.lifeline import Child
from tests.experiments.running.run_process import ROOT, wait_for

SWEEP = """
import sys
import tests.experiments.running.no_torch
from experiments.run import main
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.run_process import CHILD

WORKER = "import sys, tests.experiments.running.no_torch; from experiments.running import worker;"
WORKER += "from tests.experiments.fake_engine import fake_backend;"
WORKER += "sys.exit(worker.main(fake_backend(step_seconds=10)))"
sys.exit(main(fake_backend(), [sys.executable, "-c", CHILD, "10"], [sys.executable, "-c", WORKER]))
"""

STARTER = """
import sys
from experiments.running.child import run_child
run_child(sys.argv[1:], lambda: "")
"""

STUBBORN = """
import os, signal, sys, time
from pathlib import Path
from experiments.running import lifeline

lifeline.GRACE = 0.2
helper = os.fork()  # as engines have that compute elsewhere
if helper:
    lifeline.watch()
signal.signal(signal.SIGINT, signal.SIG_IGN)
if helper:
    Path(sys.argv[1]).write_text(f"{os.getpid()} {helper} ")
time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def running(pid: int) -> bool:
    """Whether the process is there and no zombie that nobody asks after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ignores(pid: int, number: int) -> bool:
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigIgn"], 16) >> (number - 1) & 1)


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("more", [[], ["+share_model=true"]])
def test_arm_of_a_killed_sweep_ends_and_cleans_up(arguments, results, tmp_path, more):
    (tmp_path / "own.yaml").write_text("axes: {seed: [0, 1]}")
    sweep = start(SWEEP, *arguments, f"+sweep={tmp_path}/own.yaml", *more)
    wait_for(lambda: list(results.glob("*.partial/config.yaml")))
    (child,) = children(sweep)
    kill(sweep)
    wait_for(lambda: not running(child), seconds=8)
    assert not list(results.glob("*.partial"))


def test_benchmark_of_a_killed_process_ends(tmp_path):
    os.mkfifo(tmp_path / "arm.json")  # it waits for its task
    starter = start(STARTER, sys.executable, "-m", "experiments.bench.worker", f"{tmp_path}/arm.json", "row.json")
    wait_for(lambda: children(starter))
    (child,) = children(starter)
    wait_for(lambda: Path(f"/proc/{child}/task").is_dir() and len(os.listdir(f"/proc/{child}/task")) > 1)
    kill(starter)
    wait_for(lambda: not running(child))


def test_child_that_will_not_be_interrupted_is_killed_with_its_group(tmp_path):
    said = tmp_path / "pids"
    starter = start(STARTER, sys.executable, "-c", STUBBORN, str(said))
    wait_for(lambda: said.exists() and said.read_text().endswith(" "))
    pids = [int(pid) for pid in said.read_text().split()]
    assert all(map(running, pids))
    kill(starter)
    wait_for(lambda: not any(map(running, pids)), seconds=8)


@pytest.mark.parametrize(
    "module", ["experiments.bench.worker", "experiments.serving.drive", "experiments.serving.guard"]
)
def test_child_of_what_a_shell_started_with_an_ampersand_is_interrupted(tmp_path, module):
    os.mkfifo(tmp_path / "task.json")  # it waits for its task
    words = [f"{tmp_path}/task.json", "row.json"] if "guard" not in module else ["sleep", "60"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = Child([sys.executable, "-m", module, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        wait_for(lambda: not ignores(child.pid, signal.SIGINT), seconds=20)
        child.send_signal(signal.SIGINT)
        child.wait(8)
    finally:
        child.kill()
        child.wait()
        child.release()
