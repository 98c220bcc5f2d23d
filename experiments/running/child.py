"""Runs in processes of their own, so that whatever happens to one happens to nothing else.

A process that calls `experiments.running.lifeline.watch` ends with this one, also when this one is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from experiments.running.lifeline import Child
from experiments.running.plan_text import printable

POINTS_BACK = "root cause above"
"""In an error whose cause another process printed before."""

CAUSE = re.compile(r"\b\w*(?:Error|Exception): .+")

COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
"""What tells a terminal how to show text."""

GRACE = 30.0
"""Seconds that an interrupted process has to clean up."""


class Alone:
    """A command on its way in a process of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Raises OSError where it could not be started."""
        # A file, since a pipe would end with this process, and the child with the pipe.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            # In a group of its own, so that a terminal's Ctrl-C reaches it once, from here.
            self.process = Child(
                command, environment, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT
            )
        except OSError:
            self._output.close()
            raise

    def poll(self) -> tuple[int, str] | None:
        """The exit code, negative for the signal that killed it, and what it printed; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        self._output.seek(0)
        return code, self._output.read().decode(errors="replace")

    def tail(self, size: int) -> str:
        """The last bytes that it printed so far."""
        # Not a seek: the process writes at the file's own place.
        number = self._output.fileno()
        return os.pread(number, size, max(0, os.fstat(number).st_size - size)).decode(errors="replace")

    def close(self) -> None:
        """Let go of the process, which has ended."""
        self.process.release()
        self._output.close()


def run_child(command: Sequence[str], tick: Callable[[], object]) -> tuple[int, str]:
    """Run a command to its end.

    Args:
        tick: called about once a second meanwhile.

    Returns:
        The exit code, negative for the signal that killed it, and what it printed.

    Raises:
        OSError: it could not be started.
        KeyboardInterrupt: and the process has ended.
    """
    child = Alone(command)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=1)
                return child.poll()
            tick()
    except BaseException:
        stop([child.process])
        raise
    finally:
        child.close()


class Worker:
    """A process that does one task after another, and ends with the first that fails.

    The command gets a file descriptor as its last argument. It reads tasks from its standard input, a line of JSON
    each, with "arguments" and the "environment" that they are for, and writes a line to the descriptor after each that
    is done.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Raises OSError where it could not be started."""
        told, tells = os.pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = Child(
                [*command, str(tells)],
                environment,
                pass_fds=(tells,),
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        except OSError:
            os.close(told)
            self._output.close()
            raise
        finally:
            os.close(tells)
        self._told = os.fdopen(told, "rb")
        self._begin = 0

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Hand over a task."""
        # Not a seek: the process writes at the file's own place.
        self._begin = os.fstat(self._output.fileno()).st_size
        task = {"arguments": list(arguments), "environment": dict(environment or {})}
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the other pipe tells
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def poll(self, seconds: float = 0.0) -> tuple[int, str] | None:
        """As `Alone.poll`, of the task; waits for it so long. Any exit code but 0 ends the process too."""
        if not select.select([self._told], [], [], seconds)[0]:
            return None
        code = 0 if self._told.readline() else self.process.wait()
        size = os.fstat(self._output.fileno()).st_size - self._begin
        return code, os.pread(self._output.fileno(), size, self._begin).decode(errors="replace")

    def close(self) -> None:
        """End the process, which is idle."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.release()
        self._told.close()
        self._output.close()


def stop(processes: Sequence[Child]) -> None:
    """Interrupt processes, and kill them where that takes too long or the person is impatient."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason_of(code: int, output: str) -> str:
    """Why a run failed, in one line, from its exit code and what it printed."""
    if code < 0:
        return f"killed by {_signal_name(-code)}" + " (did the memory run out?)" * (code == -signal.SIGKILL)
    if code == 0:
        return (
            "ended without the record that it was to make: did what it reads change since the sweep began, or is this "
            "another kind of GPU?"
        )
    lines = [line.strip() for line in COLOURS.sub("", output).splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    if said and POINTS_BACK in said[-1]:
        causes = [found[0] for line in lines if POINTS_BACK not in line and (found := CAUSE.search(line))]
        said += causes[-1:]
    return printable(said[-1]) if said else f"ended with exit code {code} and no output"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
