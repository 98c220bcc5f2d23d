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
from collections.abc import Callable, Sequence

from experiments.running.lifeline import Child
from experiments.running.plan_text import printable

POINTS_BACK = "root cause above"
"""In an error whose cause another process printed before."""

CAUSE = re.compile(r"\b\w*(?:Error|Exception): .+")

COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
"""What tells a terminal how to show text."""

GRACE = 30.0
"""Seconds that an interrupted process has to clean up."""


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
    # A file, since a pipe would end with this process, and the child with the pipe.
    with tempfile.TemporaryFile() as output:
        # In a group of its own, so that a terminal's Ctrl-C reaches it once, from here.
        process = Child(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = _wait(process, tick)
        except BaseException:
            _stop(process)
            raise
        finally:
            process.release()
        output.seek(0)
        return code, output.read().decode(errors="replace")


class Worker:
    """A process that does one task after another, and ends with the first that fails.

    The command gets a file descriptor as its last argument. It reads tasks from its standard input, a JSON list of
    texts a line, and writes a line to the descriptor after each that is done.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Raises OSError where it could not be started."""
        told, tells = os.pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = Child(
                [*command, str(tells)],
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

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, task: Sequence[str], tick: Callable[[], object]) -> tuple[int, str]:
        """Do a task. Arguments, returns and raises as `run_child`; any exit code but 0 ends the process too."""
        # Not a seek: the process writes at the file's own place.
        begin = os.fstat(self._output.fileno()).st_size
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the other pipe tells
                self._process.stdin.write(json.dumps(list(task)).encode() + b"\n")
                self._process.stdin.flush()
            while not select.select([self._told], [], [], 1)[0]:
                tick()
            code = 0 if self._told.readline() else self._process.wait()
        except BaseException:
            _stop(self._process)
            raise
        size = os.fstat(self._output.fileno()).st_size - begin
        output = os.pread(self._output.fileno(), size, begin).decode(errors="replace")
        return code, output

    def close(self) -> None:
        """End the process, which is idle."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.release()
        self._told.close()
        self._output.close()


def reason_of(code: int, output: str) -> str:
    """Why a run failed, in one line, from its exit code and what it printed."""
    if code < 0:
        return f"killed by {_signal_name(-code)}" + " (did the memory run out?)" * (code == -signal.SIGKILL)
    if code == 0:
        return "ended without the record that it was to make: did what it reads change since the sweep began?"
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


def _wait(process: subprocess.Popen[bytes], tick: Callable[[], object]) -> int:
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            tick()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, and kill it where that takes too long or the person is impatient."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
