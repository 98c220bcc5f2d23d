"""`python -m experiments.running.worker DESCRIPTOR`: arms of a sweep, one after another, around one loaded model.

The process of an `experiments.running.child.Worker`: a task is the overrides of an arm. What is loaded once is the
model and the questions; engine, cache and graphs are each arm's own. An arm that fails ends the process, so that no
other meets what it left behind.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Mapping

from experiments.backends import BACKENDS, BackendFactory
from experiments.config.compose import load_experiment
from experiments.run import exit_code
from experiments.running import job, lifeline
from experiments.running.models import find_model
from experiments.running.sweep import remembered
from experiments.workloads import load_problems


def main(backends: Mapping[str, BackendFactory] = BACKENDS) -> int:
    """Returns 0 at the end of the tasks, or the exit code of the arm that failed."""
    lifeline.watch()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    problems, model = remembered(load_problems), remembered(find_model)

    def carry_out(overrides: list[str]) -> None:
        command = ["-m", "experiments.run", *overrides]
        job.carry_out(job.prepare(load_experiment(overrides), backends, problems, model, command))

    try:
        from zipage import share_model

        with os.fdopen(int(sys.argv[1]), "w") as done, share_model():
            for line in sys.stdin:
                task = json.loads(line)
                os.environ.update(task["environment"])
                if code := exit_code(lambda task=task: carry_out(task["arguments"])):
                    return code
                sys.stdout.flush()
                _free()
                print("done", file=done, flush=True)
    except KeyboardInterrupt:
        print("error: interrupted: nothing was recorded", file=sys.stderr, flush=True)
        return 130
    return 0


def _free() -> None:
    """Give back what the arm's engine held: the next plans its cache by the memory that is free."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
