"""A sweep on the fake engine, for a process of its own, which has the arguments SECONDS LOADS OPTION...

SECONDS slows down each step. Each arm adds a line to the file LOADS when its engine is loaded, and one to LOADS.log
when it "begins" then, "serves", and "ends": that word, the process, and the arm's seed and policy. After the first it
waits while there is a file LOADS.gate. Arms are forked from this process, so that they need not import torch again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments import run
from experiments.launchers import local
from tests.experiments.fake_engine import fake_backend


class Fork:
    """Stands in for `child.Alone`: the command is carried out by `main` in a fork of this process."""

    main = staticmethod(run.main)

    def __init__(self, command, environment):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._code = None
        self.process, self.pid = self, os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.environ.update(environment)
            for descriptor in (1, 2):
                os.dup2(self._output.fileno(), descriptor)
            sys.argv = list(command)
            code = self.main()
            sys.stdout.flush()
            os._exit(code)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def poll(self) -> tuple[int, str] | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                return None
            self._code = os.waitstatus_to_exitcode(status)
        self._output.seek(0)
        return self._code, self._output.read()

    def close(self) -> None:
        self._output.close()

    def send_signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> None:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)


def main() -> int:
    seconds, loads = float(sys.argv.pop(1)), Path(sys.argv.pop(1))
    fake = fake_backend(step_seconds=seconds)["zipage"]

    def load(**options):
        with loads.open("a") as file:
            file.write(f"{os.getpid()}\n")
        log("begins", options)
        while Path(f"{loads}.gate").exists():
            time.sleep(0.01)
        engine = fake(**options)
        add_request = engine.add_request

        def first_request(*request):
            log("serves", options)
            engine.add_request = add_request
            return add_request(*request)

        engine.add_request = first_request
        engine.shutdown = lambda: log("ends", options)
        return engine

    def log(what, options) -> None:
        with Path(f"{loads}.log").open("a") as file:
            file.write(f"{what} {os.getpid()} {options['seed']} {options['policy']}\n")

    Fork.main = staticmethod(lambda: run.main({"zipage": load}))
    local.Alone = Fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run.main({"zipage": load}, child=["run"])
