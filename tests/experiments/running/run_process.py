"""The main job on the fake engine in a process of its own, for the tests of runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]

CHILD = """
import sys
from experiments.run import main
from tests.experiments.fake_engine import fake_backend
sys.exit(main(fake_backend(step_seconds=float(sys.argv.pop(1)))))
"""


def start(step_seconds: float, arguments: list[str]) -> subprocess.Popen:
    """The main job in a process of its own, on the fake engine."""
    command = [sys.executable, "-c", CHILD, str(step_seconds), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds: float = 50) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
