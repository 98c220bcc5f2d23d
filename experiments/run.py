"""`python -m experiments.run`: ask a model the questions of a workload, grade the answers, keep a record.

With `+sweep=NAME` it does so for every arm of a sweep; `scenario=kernels` and `scenario=engine_bench` run benchmarks.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments import bench
from experiments.backends import BACKENDS, BackendFactory
from experiments.command_line import INTERRUPTED, stop_signals
from experiments.config.arms import check_multirun, split_command_line
from experiments.config.check import SERVED
from experiments.config.compose import build, register
from experiments.config.explain import explain
from experiments.config.flags import DRY_RUN, arranged
from experiments.config.known import is_text
from experiments.config.overrides import as_written
from experiments.config.schema import LauncherConfig
from experiments.errors import LateInterrupt, RunError, UsageError
from experiments.paths import CONF
from experiments.records import load_runs
from experiments.reporting.runs_table import with_notes
from experiments.running import job, lifeline, sweep


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
    with stop_signals():
        return _main(backends, child, worker)


def _main(backends: Mapping[str, BackendFactory], child: Sequence[str], worker: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    codes: list[int] = []
    said: set[str] = set()
    folders: list[Path] = []
    several = False

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def entry(config: DictConfig) -> None:
        codes.append(_run(config, backends, said, folders if several else None))

    if not CONF.is_dir():
        return _fail(f"no folder {CONF}: run from a clone, installed with `pip install -e .`", 2)
    register()
    # Makes Hydra raise what it would print over many lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        typed = arranged(sys.argv[1:])
        given = [argument for argument in typed if argument != DRY_RUN]
        dry_run = len(given) < len(typed)
        sweeps, arguments = split_command_line(given)
        if sweeps:
            return sweep.run(sweeps, arguments, backends, child, worker, dry_run)
        if dry_run:
            raise UsageError(f"{DRY_RUN}: prints the plan of a +sweep=NAME; --cfg job shows the options of one run")
        several = check_multirun(arguments)
        sys.argv[1:] = [
            argument if argument.startswith("-") else as_written(argument, is_text) for argument in arguments
        ]
        entry()
        if folders:
            print(f"\n{with_notes(load_runs(folders))}", flush=True)
    except KeyboardInterrupt as interrupt:
        done = codes.count(0) + isinstance(interrupt, LateInterrupt)
        return _fail(f"interrupted: {_recorded(done, several)}", INTERRUPTED)
    except UsageError as error:
        return _fail(error, 2)
    except Exception as error:
        return _fail(explain(error), 2)
    return max(codes, default=0)


def _recorded(done: int, several: bool) -> str:
    """What an interrupted command recorded; `done` of its runs were finished."""
    if not several:
        return "the run is recorded" if done else "nothing was recorded"
    runs = {0: "no run is", 1: "1 run is"}.get(done, f"{done} runs are")
    return f"{runs} recorded, and the same command goes on"


def _run(config: DictConfig, backends: Mapping[str, BackendFactory], said: set[str], folders: list[Path] | None) -> int:
    """One run.

    Args:
        folders: of runs whose table comes at the end; None: the run shows its own.
    """

    def act() -> None:
        experiment = build(config)
        if experiment.launcher != LauncherConfig():
            raise UsageError(f"launcher={experiment.launcher.name}: launches the arms of a +sweep=NAME, not one run")
        if experiment.scenario.kind not in SERVED:
            bench.run(experiment, backends)
        elif folders is None:
            job.run(experiment, backends)
        else:
            folders.append(job.run(experiment, backends, shows=False))

    return exit_code(act, said)


def exit_code(act: Callable[[], object], said: set[str] | None = None) -> int:
    """Do a run, and say in a line how it failed if it did: 0 done, 1 it failed, 2 wrong usage.

    Args:
        said: lines of wrong usage that were said before, of other runs of the same command; they are not said again.
    """
    try:
        act()
    except UsageError as error:
        said = set() if said is None else said
        if str(error) in said:
            return 2
        said.add(str(error))
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
