"""Sweeps on the fake engine, in this process or in one of their own, for the tests of sweeps."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import run
from experiments.config.compose import load_experiment
from experiments.running import job
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running import sweep_process
from tests.experiments.running.forked import Forked

SMALL = """
axes: {engine.block_size: 16}
arms:
  - policy: full
  - {policy: [zipage, random], policy.budget_tokens: [48, 64]}
"""
SIX = """
axes: {engine.block_size: 16, policy.budget_tokens: 64, policy: [full, zipage, random], seed: [0, 1]}
"""
TIMES = ("seconds", "ttft", "tpot", "itl", "e2e", "time", "_per_second", "rate.achieved", "provenance.", "path")
"""Parts of the names of columns that differ from run to run."""


def in_place_of_processes(run) -> type:
    """Stands in for `child.Alone`: `run(command)` gives exit code and output, while this process waits."""

    class Here:
        process = SimpleNamespace(send_signal=lambda number: None, wait=lambda timeout: 0, poll=lambda: 0)

        def __init__(self, command, environment):
            os.environ.update(environment)
            try:
                self._ended = run(command)
            finally:
                for name in environment:
                    del os.environ[name]

        def poll(self) -> tuple[int, str]:
            return self._ended

        def close(self) -> None:
            return

    return Here


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return f"+sweep={path}"


@pytest.fixture
def six(tmp_path):
    path = tmp_path / "six.yaml"
    path.write_text(SIX)
    return f"+sweep={path}"


@pytest.fixture
def launch_sweep(arguments, monkeypatch):
    """A sweep whose arms run in this process; `behave(overrides)` says how the fake engine of an arm behaves."""

    def launch_sweep(*more: str, behave=lambda overrides: {}) -> int:
        def run_here(command) -> tuple[int, str]:
            launch_sweep.ran.append(command[1:])
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = run.exit_code(lambda: job.run(load_experiment(command[1:]), fake_backend(**behave(command))))
                return code, output.getvalue()

        launch_sweep.ran = []
        monkeypatch.setattr("experiments.launchers.local.Alone", in_place_of_processes(run_here))
        monkeypatch.setattr(sys, "argv", ["run", *arguments, *more])
        return run.main(fake_backend(), child=["run"])

    return launch_sweep


@pytest.fixture
def start_sweep(arguments, tmp_path):
    """A sweep in a process of its own, which forks its arms."""

    def start_sweep(*more: str, step_seconds: float = 0.0) -> Forked:
        return Forked(sweep_process.main, [str(step_seconds), str(tmp_path / "loads"), *arguments, *more])

    return start_sweep


def deterministic(runs):
    """Every column that does not depend on the clock or the machine."""
    kept = [name for name in runs.columns if not any(part in name for part in TIMES)]
    assert {"run", "accuracy", "output_tokens", "compressions", "steps", "peak_blocks", "policy.name"} <= set(kept)
    return runs[kept]


def sweep_file(results: Path) -> Path:
    (path,) = (results / "sweeps").glob("*.json")
    return path
