"""Programs in processes of their own, forked from one that has imported what they import, which takes seconds.

A forked program is like a started one: it leads a process group, its signals are as Python sets them, and output,
arguments, environment and folder are its own. Tests of the start itself start Python.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[3]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["zipage", "tests.experiments.running.warm"])


class Forked:
    """Stands in for `subprocess.Popen` of Python in the root of the repository, without an input.

    Args:
        main: a function of a module; returns the exit code.
        arguments: `sys.argv[1:]`.
        apart: whether `communicate` returns what is written to stderr by itself.
    """

    def __init__(self, main: Callable[[], int], arguments: Sequence[str], apart: bool = False) -> None:
        self._out = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        self._err = tempfile.NamedTemporaryFile("r") if apart else None  # noqa: SIM115
        outputs = (self._out.name, (self._err or self._out).name)
        self._process = FORKS.Process(target=_carry_out, args=(main, list(arguments), dict(os.environ), outputs))
        self._process.start()
        atexit.register(self._process.kill)  # before multiprocessing waits for it
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        self.wait(timeout)
        return _read(self._out), self._err and _read(self._err)


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _carry_out(
    main: Callable[[], int], arguments: list[str], environment: dict[str, str], outputs: tuple[str, str]
) -> None:
    os.setpgid(0, 0)
    for descriptor, name in enumerate(outputs, 1):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [main.__module__, *arguments]
    sys.exit(main())
