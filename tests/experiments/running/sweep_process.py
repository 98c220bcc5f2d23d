"""A sweep on the fake engine in a process of its own:

python -m tests.experiments.running.sweep_process SECONDS LOADS OPTION...

SECONDS slows down each step. Each arm adds a line to the file LOADS when its engine is loaded. Arms are forked from
this process, so that they need not import torch again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from experiments import run
from experiments.running import sweep
from tests.experiments.fake_engine import fake_backend


def main() -> int:
    seconds, loads = float(sys.argv.pop(1)), Path(sys.argv.pop(1))
    fake = fake_backend(step_seconds=seconds)["zipage"]

    def load(**options):
        with loads.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return fake(**options)

    def fork(command, progress) -> tuple[int, str]:
        with tempfile.TemporaryFile("w+") as output:
            pid = os.fork()
            if pid == 0:
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
                sys.argv = list(command)
                code = run.main({"zipage": load})
                sys.stdout.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            return code, output.read()

    sweep.run_child = fork
    return run.main({"zipage": load}, child=["run"])


if __name__ == "__main__":
    sys.exit(main())
