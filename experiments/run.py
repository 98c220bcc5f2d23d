"""`python -m experiments.run`: ask a model the questions of a workload, grade the answers, keep a record.

With `+sweep=NAME` it does so for every arm of a sweep; `scenario=kernels` and `scenario=engine_bench` run benchmarks.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import hydra
from omegaconf import DictConfig

from experiments import bench
from experiments.backends import BACKENDS, BackendFactory
from experiments.config.arms import check_multirun, split_command_line
from experiments.config.compose import build, register
from experiments.config.explain import explain
from experiments.config.known import is_text
from experiments.config.overrides import as_written
from experiments.errors import RunError, UsageError
from experiments.paths import CONF
from experiments.running import job, lifeline, sweep

DRY_RUN = "--dry-run"


def main(
    backends: Mapping[str, BackendFactory] = BACKENDS,
    child: Sequence[str] = sweep.RUN,
    worker: Sequence[str] = sweep.WORKER,
) -> int:
    """The command line. Returns its exit code: 0 done, 1 a run failed, 2 wrong usage, 130 interrupted.

    Args:
        child: the command that makes one run of a sweep.
        worker: the command that makes one after another (`experiments.running.worker`).
    """
    lifeline.watch()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    codes = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def entry(config: DictConfig) -> None:
        codes.append(_run(config, backends))

    if not CONF.is_dir():
        return _fail(f"no folder {CONF}: run from a clone, installed with `pip install -e .`", 2)
    register()
    # Makes Hydra raise what it would print over many lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        given = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
        dry_run = len(given) < len(sys.argv) - 1
        sweeps, arguments = split_command_line(given)
        if sweeps:
            return sweep.run(sweeps, arguments, backends, child, worker, dry_run)
        if dry_run:
            raise UsageError(f"{DRY_RUN}: prints the plan of a +sweep=NAME; --cfg job shows the options of one run")
        check_multirun(arguments)
        sys.argv[1:] = [
            argument if argument.startswith("-") else as_written(argument, is_text) for argument in arguments
        ]
        entry()
    except KeyboardInterrupt:
        return _fail("interrupted: nothing was recorded", 130)
    except UsageError as error:
        return _fail(error, 2)
    except Exception as error:
        return _fail(explain(error), 2)
    return max(codes, default=0)


def _run(config: DictConfig, backends: Mapping[str, BackendFactory]) -> int:
    def act() -> None:
        experiment = build(config)
        (job if experiment.scenario.kind == "serve" else bench).run(experiment, backends)

    return exit_code(act)


def exit_code(act: Callable[[], object]) -> int:
    """Do a run, and say in a line how it failed if it did: 0 done, 1 it failed, 2 wrong usage."""
    try:
        act()
    except UsageError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _fail(line: object, code: int) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
