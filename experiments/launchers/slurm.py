"""Arms as an array of Slurm jobs, through submitit. Each job runs what is left of the sweep until nothing is.

The nodes share the file system with the machine where the sweep was started, which follows the jobs and cancels them
when it is interrupted. Slurm requeues a job that is preempted or out of time; it goes on with what is left then.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import records
from experiments.config.schema import Experiment, LauncherConfig
from experiments.errors import UsageError, one_line
from experiments.launchers.board import Board, work
from experiments.launchers.local import visible_gpus
from experiments.launchers.task import ELSEWHERE, Commands, Report, Task, gpus_of
from experiments.records import claims, provenance
from experiments.running.child import GRACE

MOST_JOBS = 1000
"""Of an array; Slurm's own limit is 1,001 where its site has not set another."""
LOOK = 10.0
"""Seconds between two questions to Slurm."""
TASKS = "tasks.pickle"


@contextlib.contextmanager
def connected(config: LauncherConfig, commands: Commands, arms: Sequence[Experiment], folder: Path) -> Iterator[Slurm]:
    """A launcher on the cluster of this machine.

    Args:
        folder: of a board, and of what submitit writes; it stays where jobs were lost.
    """
    try:
        import submitit
    except ImportError as error:
        raise UsageError('launcher=slurm: submitit is not installed here: pip install -e ".[slurm]"') from error
    parameters = _parameters(config, max(map(gpus_of, arms)))
    try:
        executor = submitit.AutoExecutor(folder, cluster=config.cluster or "slurm", slurm_max_num_timeout=MOST_JOBS)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, AssertionError) as error:
        raise UsageError(f"launcher=slurm: {one_line(error)}") from error
    accelerator = config.accelerator
    if accelerator is None and any(map(gpus_of, arms)):
        with _submitted(partial(executor.submit_array, [partial(provenance.device_name, "auto")])) as jobs:
            print(f"{jobs} asks for the name of the GPU; launcher.accelerator=NAME does without it", flush=True)
            accelerator = jobs.result()
    launcher = Slurm(executor, config, commands, accelerator, folder)
    try:
        yield launcher
    finally:
        if not launcher.lost:
            shutil.rmtree(folder, ignore_errors=True)


def _parameters(config: LauncherConfig, needed: int) -> dict[str, Any]:
    """Of `AutoExecutor.update_parameters`.

    Args:
        needed: GPUs of the arm that takes the most.
    """
    own = dict(config.parameters)
    gpus = config.gpus if config.gpus is not None else needed
    if gpus < needed:
        raise UsageError(f"launcher.gpus={gpus}: an arm takes {needed} GPUs")
    named = any(name == "gres" or name.startswith("gpus") for name in own)
    return {
        "name": "zipage",
        "nodes": 1,
        "tasks_per_node": 1,
        "timeout_min": config.timeout,
        "cpus_per_task": config.cpus,
        "gpus_per_node": None if named or not gpus else gpus,
        "slurm_partition": config.partition,
        "slurm_array_parallelism": config.array_parallelism,
        "slurm_additional_parameters": own or None,
    }


class Slurm:
    """A `Launcher`.

    Attributes:
        lost: whether jobs ended before their arms did.
    """

    def __init__(
        self, executor: Any, config: LauncherConfig, commands: Commands, accelerator: str | None, folder: Path
    ) -> None:
        self._executor, self._config, self._commands, self.accelerator = executor, config, commands, accelerator
        self._board = Board(folder)
        self.lost = False

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        left = list(tasks)
        while left:
            before = len(left)
            (self._board.folder / TASKS).write_bytes(pickle.dumps(left))
            count = min(self._config.workers or before, before, MOST_JOBS)
            works = [Work(self._commands, Path.cwd(), self._board.folder)] * count
            with _submitted(partial(self._executor.submit_array, works), self._board.stop) as jobs:
                report.note(f"{jobs}; logs in {self._board.folder}")
                left = self._follow(left, jobs, report)
                why = jobs.why
            self.lost |= bool(left)
            if len(left) == before:
                left, were_held = self._wait_for_others(left, report)
                if not were_held:
                    break
            if left:
                report.note(f"the jobs ended before {len(left)} of the arms did ({why}): these are submitted again")
        for task in left:
            worker = self._board.worker_of(task)
            report.ended(task, worker or "no job", f"{worker or 'every job'} ended before the arm did ({why})", None)

    def _follow(self, left: list[Task], jobs: Jobs, report: Report) -> list[Task]:
        """Pass on how arms fare until all have ended or no job is left. Returns those that have not ended."""
        looked = time.monotonic()
        while left:
            time.sleep(1.0)
            gone = False
            if time.monotonic() - looked > LOOK:
                gone, looked = not jobs.are_alive(), time.monotonic()
            left = self._board.tell(left, report)
            report.tick()
            if gone:
                break
        return left

    def _wait_for_others(self, left: list[Task], report: Report) -> tuple[list[Task], bool]:
        """Wait while processes outside of this sweep, such as jobs of an earlier start, make all of these arms.

        Returns:
            What is left then, and whether any of it was held by another process.
        """
        were_held = False
        while left:
            claimed = [claims.take(task.folder) for task in left]
            free = [task for task, claim in zip(left, claimed, strict=True) if claim is not None]
            over = [task for task in free if records.stamp(task.folder) != task.before]
            for claim in filter(None, claimed):
                claim.release()
            for task in over:
                report.ended(task, ELSEWHERE, None, None)
            left = [task for task in left if task not in over]
            if len(free) > len(over):
                break
            if left and not were_held:
                report.note(f"other processes are making what is to go ({len(left)}): waiting for them")
            were_held = True
            report.tick()
            time.sleep(LOOK)
        return left, were_held


@dataclass(frozen=True)
class Work:
    """What a job does, and does again when Slurm has requeued it."""

    commands: Commands
    cwd: Path
    board: Path

    def __call__(self) -> None:
        import submitit

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # submitit would wait for another signal
        tasks = pickle.loads((self.board / TASKS).read_bytes())
        gpus = visible_gpus() if any(task.gpus for task in tasks) else []
        name = f"{socket.gethostname()} (job {submitit.JobEnvironment().job_id})"
        work(tasks, self.commands, self.cwd, self.board, name, gpus)

    def checkpoint(self) -> Any:
        """Asked for by submitit when the job's time is nearly up: nothing but the arm in progress is lost."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class Jobs:
    """Jobs that were submitted together."""

    def __init__(self, jobs: Sequence[Any]) -> None:
        import submitit

        self._jobs = jobs
        self._array = jobs[0].job_id.partition("_")[0]
        self._of_slurm = isinstance(jobs[0], submitit.SlurmJob)

    def __str__(self) -> str:
        if not self._of_slurm:
            return f"jobs {', '.join(job.job_id for job in self._jobs)} of this machine"
        return f"Slurm's job {self._array}" + (f" of {len(self._jobs)}" if len(self._jobs) > 1 else "")

    def are_alive(self) -> bool:
        """Whether any of them runs or will run."""
        if not self._of_slurm:
            return any(not job.done() for job in self._jobs)
        # Not sacct, which needs a data base that many clusters do without.
        command = ["squeue", "--noheader", "--format=%i", f"--jobs={self._array}"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode:  # of a job that ended long ago, or while nobody answers
            return "Invalid job id" not in asked.stderr
        return bool(asked.stdout.strip())

    def result(self) -> Any:
        """Wait for the result of the only one. Raises UsageError where it failed."""
        (job,) = self._jobs
        while not job.paths.result_pickle.exists():
            if not self.are_alive():
                raise UsageError(f"launcher=slurm: {self} ended without a result ({self.why})")
            time.sleep(1.0)
        try:
            return job.result()
        except Exception as error:
            raise UsageError(f"launcher=slurm: {self} failed ({self.why})") from error

    @property
    def why(self) -> str:
        """The last line that a job wrote which did not come to its end."""
        for job in self._jobs:
            lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
            if lines and "success" not in lines[-1]:
                return lines[-1]
        return "without an error"

    def end(self) -> None:
        """Cancel them, and wait until they have ended unless that takes too long or the person is impatient."""
        until = time.monotonic() + GRACE
        with contextlib.suppress(KeyboardInterrupt):
            if self._of_slurm:
                subprocess.run(["scancel", self._array], capture_output=True, check=False)
            while self.are_alive() and time.monotonic() < until:
                time.sleep(0.5)
        if not self._of_slurm:
            for job in self._jobs:
                job.cancel(check=False)


@contextlib.contextmanager
def _submitted(submit: Callable[[], list[Any]], stop: Callable[[], None] = lambda: None) -> Iterator[Jobs]:
    """Jobs that end with this.

    Args:
        stop: asks them to end, which Slurm does for its own.

    Raises:
        UsageError: Slurm refuses them.
    """
    try:
        jobs = Jobs(submit())
    except RuntimeError as error:  # as all that submitit raises is
        raise UsageError(f"launcher=slurm: {str(error).strip().splitlines()[-1]}") from error
    try:
        yield jobs
    except BaseException:
        stop()
        raise
    finally:
        jobs.end()
