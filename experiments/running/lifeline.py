"""A process that ends when the one that started it has ended, however that was.

The parent holds one end of a pipe and writes nothing to it; the kernel closes it with the parent, also after `kill -9`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

VARIABLE = "ZIPAGE_LIFELINE"
"""Tells a child which descriptor is its end of the pipe."""

GRACE = 10.0
"""Seconds that a process has to clean up after its parent has ended."""


class Child(subprocess.Popen):
    """`subprocess.Popen` in a process group of its own, with a lifeline that the child may watch."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        **options: Any,
    ) -> None:
        """
        Args:
            environment: beside this process's own.
        """
        watched, self._held = os.pipe()
        environment = os.environ | (environment or {}) | {VARIABLE: str(watched)}
        try:
            super().__init__(command, process_group=0, env=environment, pass_fds=(*pass_fds, watched), **options)
        except BaseException:
            os.close(self._held)
            raise
        finally:
            os.close(watched)

    def release(self) -> None:
        """Let go of the lifeline of a process that has ended."""
        os.close(self._held)


def watch() -> None:
    """End this process, and those of its group, when the parent that made it a `Child` has ended.

    It is interrupted like by Ctrl-C first, which this makes heard: what a shell starts with & ignores it, and so does
    all that that starts. Without such a parent this does nothing.
    """
    descriptor = os.environ.pop(VARIABLE, None)  # not for children of this process: each has a lifeline of its own
    if descriptor is not None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's to a job is the parent's to answer
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # Ray blocks it in what it starts
        os.set_inheritable(int(descriptor), False)
        threading.Thread(target=_end_with, args=(int(descriptor),), name="lifeline", daemon=True).start()


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os.killpg(os.getpid(), signal.SIGKILL)
