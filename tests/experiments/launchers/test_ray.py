"""launcher=ray on a real cluster of this machine: tasks, a worker that is killed, Ctrl-C, and what can not be had."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.records import claims
from tests.experiments.running.run_process import ROOT, wait_for
from tests.experiments.running.sweep_helpers import launch_sweep, small  # noqa: F401
from tests.experiments.running.test_lifeline import running

SWEEP = """
import sys
import tests.experiments.running.no_torch
from experiments.run import main
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.run_process import CHILD

sys.exit(main(fake_backend(), child=[sys.executable, "-c", CHILD, sys.argv.pop(1)]))
"""


PATIENCE = 300.0
"""Seconds. A cluster is a dozen processes, which take 15 of one core until an arm has begun: a machine may be slow."""


@pytest.fixture
def start(arguments, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "three.yaml").write_text("axes: {engine.block_size: 16, seed: [0, 1, 2]}")
    options = [*arguments, f"+sweep={tmp_path}/three.yaml", "launcher=ray", "launcher.workers=2"]

    def start(step_seconds: float) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", SWEEP, str(step_seconds), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    return start


def owners(results: Path) -> dict[int, str]:
    """Process -> run, of those that hold a claim."""
    runs = [path.name for path in results.glob(f"{claims.FOLDER}/*") if "." not in path.name]
    found = {name: claims.holder(results / name) for name in runs}
    return {owner["pid"]: name for name, owner in found.items() if owner is not None}


def begun(results: Path) -> list[str]:
    return [path.parent.name.split(".")[0] for path in results.glob("*.partial/config.yaml")]


def descendants(pid: int) -> set[int]:
    found = {pid}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found |= descendants(int(path.parent.name))
    return found


def test_a_killed_worker_costs_its_arm_alone_and_ctrl_c_ends_all(start, results):
    started = start(60.0)
    wait_for(lambda: len(begun(results)) == 2, PATIENCE, started)
    victim, run = next(iter(owners(results).items()))
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: run in owners(results).values() and victim not in owners(results), PATIENCE, started)
    wait_for(lambda: len(begun(results)) == 2, PATIENCE, started)
    processes = descendants(started.pid)
    assert len(processes) > 5
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    output = started.communicate(timeout=PATIENCE)[0]
    assert started.returncode == 130, output
    assert re.search(r"^arm \d: \S+ was lost \(WorkerCrashedError: .*\); it is run again$", output, re.MULTILINE)
    assert output.count(": begins on ") == 2
    assert output.count(": begins again on ") == 1
    assert output.endswith("\nerror: interrupted: 0 of 3 arms recorded, and the same command goes on\n")
    wait_for(lambda: not any(map(running, processes)))
    assert sorted(path.name for path in results.iterdir()) == [".locks", "sweeps"]
    assert not list((results / claims.FOLDER).iterdir())


def test_it_is_said_how_ray_is_had(launch_sweep, small, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    assert launch_sweep(small, "launcher=ray") == 2
    assert capsys.readouterr().err == 'error: launcher=ray: Ray is not installed here: pip install -e ".[ray]"\n'


def test_tasks_share_no_model(launch_sweep, small, capsys):  # noqa: F811
    assert launch_sweep(small, "launcher=ray", "+share_model=true") == 2
    assert "+share_model=true: tasks of launcher=ray share nothing" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_one_line(launch_sweep, small, capsys, monkeypatch):  # noqa: F811
    ray = pytest.importorskip("ray")

    def init(address, **options):  # as it does where none runs, unlike here beside other tests
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.setattr(ray, "init", init)
    assert launch_sweep(small, "launcher=ray", "launcher.address=auto") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: launcher.address=auto: no Ray cluster can be had (ConnectionError: Could not find")
    assert err.count("\n") == 1
