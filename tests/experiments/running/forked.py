"""Programs in processes of their own, forked from one that has imported what they import, which takes seconds.

A forked program is like a started one: it leads a process group, its signals are as Python sets them, and output,
arguments, environment and folder are its own. Tests of the start itself start Python.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from experiments.running import lifeline
from zipage import processes

ROOT = Path(__file__).parents[3]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["zipage", "tests.experiments.running.warm"])


class _Process:
    """Stands in for `subprocess.Popen`: `main` of a module with `arguments` as `sys.argv[1:]` and these descriptors."""

    def __init__(
        self,
        main: Callable[[], int],
        arguments: Sequence[str],
        descriptors: Mapping[int, int],
        environment: Mapping[str, str],
    ) -> None:
        """
        Args:
            descriptors: those of the process -> those here.
        """
        inherited = {theirs: _Descriptor(ours) for theirs, ours in descriptors.items()}
        self._process = FORKS.Process(target=_carry_out, args=(main, list(arguments), dict(environment), inherited))
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

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.returncode


class Forked(_Process):
    """A program in the root of the repository, without an input.

    Args:
        main: a function of a module; returns the exit code.
        arguments: `sys.argv[1:]`.
        apart: whether `communicate` returns what is written to stderr by itself.
    """

    def __init__(self, main: Callable[[], int], arguments: Sequence[str], apart: bool = False) -> None:
        self._out = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        self._err = tempfile.NamedTemporaryFile("r") if apart else None  # noqa: SIM115
        outputs = [os.open(file.name, os.O_WRONLY | os.O_APPEND) for file in (self._out, self._err or self._out)]
        super().__init__(main, arguments, dict(enumerate(outputs, 1)), os.environ)
        for output in outputs:
            os.close(output)

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        self.wait(timeout)
        return _read(self._out), self._err and _read(self._err)


class ForkedPython(_Process):
    """Stands in for `subprocess.Popen` of a `zipage.processes.Child`: it ends with the process that forks, not ours."""

    def __init__(self, command: Sequence[str], *, stdin: int, pass_fds: Sequence[int], env: Mapping[str, str]) -> None:
        assert command[1:4] == ["-P", "-m", processes.__name__]
        super().__init__(_run_child, command[4:], {1: 1, 2: 2} | {number: number for number in pass_fds}, env)


def _run_child() -> int:
    target, descriptor, _ = sys.argv[1:]
    sys.path[:] = os.environ["PYTHONPATH"].split(os.pathsep)
    processes.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedPython})  # its own children, too
    processes._run(target, int(descriptor), os.getppid())
    return 0


class ForkedChild(_Process):
    """Stands in for `lifeline.Child`, whose command is here `main` and arguments.

    What is passed has another number there, also where it is an argument.
    """

    def __init__(
        self,
        command: Sequence[Any],
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
    ) -> None:
        assert stderr == subprocess.STDOUT
        watched, self._held = os.pipe()
        if stdin == subprocess.PIPE:
            given, writes = os.pipe()
            self.stdin = os.fdopen(writes, "wb")
        else:
            given = os.open(os.devnull, os.O_RDONLY)
        environment = os.environ | (environment or {}) | {lifeline.VARIABLE: str(watched)}
        outputs = {0: given, 1: stdout.fileno(), 2: stdout.fileno()}
        super().__init__(*command[:1], command[1:], outputs | {n: n for n in (*pass_fds, watched)}, environment)
        os.close(given)
        os.close(watched)

    def release(self) -> None:
        os.close(self._held)


class _Descriptor:
    """A descriptor that reaches another process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.number)

    def __setstate__(self, duplicate: Any) -> None:
        self.number = duplicate.detach()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _carry_out(
    main: Callable[[], int], arguments: list[str], environment: dict[str, str], descriptors: dict[int, _Descriptor]
) -> None:
    os.setpgid(0, 0)
    here = {str(number): str(descriptor.number) for number, descriptor in descriptors.items() if number > 2}
    for number, descriptor in descriptors.items():
        if number <= 2:
            os.dup2(descriptor.number, number)
    if 0 in descriptors:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if (watched := environment.get(lifeline.VARIABLE)) is not None:
        environment[lifeline.VARIABLE] = here[watched]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [main.__module__, *(here.get(argument, argument) for argument in arguments)]
    sys.exit(main())
