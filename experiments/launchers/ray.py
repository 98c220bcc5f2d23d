"""Arms on a Ray cluster, a task each. The nodes share the file system with the machine where the sweep was started."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.config.schema import Experiment, LauncherConfig
from experiments.errors import UsageError, one_line
from experiments.launchers.board import Board, work
from experiments.launchers.task import Commands, Report, Task, gpus_of
from experiments.records import provenance
from experiments.running.child import GRACE

TRIES = 2
"""Workers that may be lost with an arm before it counts as failed."""
AGAIN = 30.0
"""Seconds until an arm that a process outside the sweep makes is tried again."""


@contextlib.contextmanager
def connected(config: LauncherConfig, commands: Commands, arms: Sequence[Experiment], folder: Path) -> Iterator[Ray]:
    """A launcher on the cluster at `config.address`, or on one of this machine that ends with this.

    Args:
        folder: of a board, which ends with this.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError('launcher=ray: Ray is not installed here: pip install -e ".[ray]"') from error
    own = config.address is None
    here: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, (config.workers or 1) * _cpus(config))} if own else {}
    try:
        with _own_signals():
            ray.init(
                address=config.address or "local", include_dashboard=False if own else None, log_to_driver=False,
                logging_level=logging.ERROR, **here,
            )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise UsageError(f"launcher.address={config.address}: no Ray cluster can be had ({one_line(error)})") from error
    try:
        yield Ray(ray, config, commands, _accelerator(ray, config, arms), folder)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's way to end: Ray sets its own, which cleans nothing up."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


def _cpus(config: LauncherConfig) -> int:
    return config.cpus or 1


def _accelerator(ray: Any, config: LauncherConfig, arms: Sequence[Experiment]) -> str | None:
    """The nodes' GPU. An arm with `hardware.device=auto` runs on CPUs where the cluster has no GPU."""
    takes = [arm.hardware.device for arm in arms if gpus_of(arm)]
    if config.accelerator is not None or not takes:
        return config.accelerator
    if config.address is None:
        return provenance.device_name("auto")
    if not ray.cluster_resources().get("GPU") and set(takes) == {"auto"}:
        return "cpu"
    # A process of its own, which would keep memory on the GPU.
    ask = ray.remote(num_cpus=0, num_gpus=1, max_calls=1)(provenance.device_name)
    return ray.get(ask.remote("auto"))


class Ray:
    """A `Launcher`."""

    def __init__(
        self, ray: Any, config: LauncherConfig, commands: Commands, accelerator: str | None, folder: Path
    ) -> None:
        self._ray, self._config, self._commands, self.accelerator = ray, config, commands, accelerator
        self._board = Board(folder)
        self._running: dict[Any, Task] = {}
        self._lost: dict[int, int] = {}
        """How many workers were lost with an arm."""

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        self._check(tasks, report)
        left, due = list(tasks), [(0.0, task) for task in tasks]
        try:
            while left:
                now = time.monotonic()
                for begin, task in list(due):
                    if begin <= now and len(self._running) < (self._config.workers or len(tasks)):
                        due.remove((begin, task))
                        self._submit(task)
                ended, _ = self._ray.wait(list(self._running), timeout=1.0) if self._running else ([], time.sleep(1.0))
                left = self._board.tell(left, report)
                for reference in ended:
                    task = self._running.pop(reference)
                    reason = self._fault(reference, task, report)
                    if reason is not None and task in left:
                        left.remove(task)
                        report.ended(task, self._board.worker_of(task) or "no worker", reason, None)
                    elif task in left and self._lost.get(task.number):
                        due.insert(0, (0.0, task))
                    elif task in left:
                        due.append((time.monotonic() + AGAIN, task))
                report.tick()
        except BaseException:
            self._stop()
            raise

    def _check(self, tasks: Sequence[Task], report: Report) -> None:
        needed = 0 if self.accelerator == "cpu" else max(task.gpus for task in tasks) if tasks else 0
        most = max((node["Resources"].get("GPU", 0) for node in self._ray.nodes() if node["Alive"]), default=0)
        if needed > most:
            report.note(f"an arm takes {needed} GPUs, and no node of the cluster has as many now: waiting for one")

    def _submit(self, task: Task) -> None:
        gpus = 0 if self.accelerator == "cpu" else task.gpus
        run = self._ray.remote(num_cpus=_cpus(self._config), num_gpus=gpus, max_retries=0)(_run)
        self._running[run.remote(task, self._commands, Path.cwd(), self._board.folder)] = task

    def _fault(self, reference: Any, task: Task, report: Report) -> str | None:
        """Why the arm can't be run, in one line; None where it ended, or is to be tried again."""
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return one_line(error.cause)
        except self._ray.exceptions.RayError as error:
            self._lost[task.number] = self._lost.get(task.number, 0) + 1
            worker = self._board.worker_of(task) or "a worker"
            line = f"{worker} was lost ({one_line(error)})"
            if self._lost[task.number] == TRIES:
                return line
            report.note(f"arm {task.number}: {line}; it is run again")
        return None

    def _stop(self) -> None:
        """End the tasks, unless that takes too long or the person is impatient: then they end with the connection."""
        self._board.stop()  # and not ray.cancel, with which Ray 2.60 may abort this process
        with contextlib.suppress(KeyboardInterrupt):
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE)


def _run(task: Task, commands: Commands, cwd: Path, board: Path) -> None:
    """The Ray task of an arm."""
    import ray

    gpus = ",".join(map(str, ray.get_gpu_ids()))
    name = socket.gethostname() + (f", GPU {gpus}" if gpus else "")
    work([task], commands, cwd, board, name)
