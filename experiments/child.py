"""A run in a process of its own, so that whatever happens to it happens to nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

GRACE = 30.0
"""Seconds that an interrupted process has to clean up."""


def run_child(command: Sequence[str], progress: Callable[[], str]) -> tuple[int, str]:
    """Run a command to its end.

    Args:
        progress: gives the line that a terminal shows meanwhile.

    Returns:
        The exit code, negative for the signal that killed it, and what it printed.

    Raises:
        OSError: it could not be started.
        KeyboardInterrupt: and the process has ended.
    """
    # A file, since a pipe would end with this process, and the child with the pipe.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C reaches it once, from here
        )
        try:
            code = _wait(process, progress)
        except BaseException:
            _stop(process)
            raise
        output.seek(0)
        return code, output.read().decode(errors="replace")


def reason_of(code: int, output: str) -> str:
    """Why a run failed, in one line, from its exit code and what it printed."""
    if code < 0:
        return f"killed by {_signal_name(-code)}" + " (did the memory run out?)" * (code == -signal.SIGKILL)
    if code == 0:
        return "ended without the record that it was to make"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    return said[-1] if said else f"ended with exit code {code} and no word"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _wait(process: subprocess.Popen[bytes], progress: Callable[[], str]) -> int:
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if sys.stdout.isatty():
                # Whatever is printed next takes the line's place.
                print(f"{progress()}\033[K\r", end="", flush=True)
        finally:
            if process.returncode is not None and sys.stdout.isatty():
                print("\033[K", end="", flush=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, and kill it where that takes too long or the person is impatient."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
