"""The main job on the fake engine in a process of its own, for the tests of runs."""

from __future__ import annotations

import subprocess
import sys
import time

from experiments import run
from tests.experiments.fake_engine import fake_backend
from tests.experiments.running.forked import ROOT, Forked  # noqa: F401

CHILD = """
import sys
import tests.experiments.running.no_torch
from experiments.run import main
from tests.experiments.fake_engine import fake_backend
sys.exit(main(fake_backend(step_seconds=float(sys.argv.pop(1)))))
"""


def main() -> int:
    return run.main(fake_backend(step_seconds=float(sys.argv.pop(1))))


def start(step_seconds: float, arguments: list[str]) -> Forked:
    """The main job in a process of its own, on the fake engine."""
    return Forked(main, [str(step_seconds), *arguments])


def wait_for(condition, seconds: float = 50, of: subprocess.Popen | Forked | None = None) -> None:
    """Returns when it holds.

    Args:
        of: what it is that makes it hold, which must not end before.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert of is None or of.poll() is None, of.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
