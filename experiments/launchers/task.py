"""What a launcher is given and what it says: arms as plain data, and how each fares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from experiments.config.schema import Experiment

ELSEWHERE = "another process"
"""Worker of an arm that no worker of this sweep made."""


@dataclass(frozen=True)
class Task:
    """An arm of a sweep that is to be run, as plain data that travels to where it is.

    Attributes:
        number: of the arm in the plan of the whole sweep, from 1.
        overrides: of `python -m experiments.run`.
        folder: where its record will lie.
        before: `records.stamp` of a record there that is to be replaced.
        shared: equal for arms that may share a loaded model; None: it shares none.
        gpus: that it takes.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    before: tuple[int, int] | None
    shared: str | None
    gpus: int


@dataclass(frozen=True)
class Commands:
    """What makes runs: a command that makes one, and that of a `child.Worker` that makes one after another."""

    alone: tuple[str, ...]
    sharing: tuple[str, ...]


class Report(Protocol):
    """Hears how arms fare."""

    def started(self, task: Task, worker: str) -> None:
        """A worker begins an arm, again perhaps; it has no name where it is the only one."""

    def ended(self, task: Task, worker: str, reason: str | None, seconds: float | None) -> None:
        """An arm is done, or failed for a reason of one line. `seconds` is None where no worker of the sweep ran it."""

    def is_over(self, task: Task) -> bool:
        """Whether another worker of the same sweep has said that the arm ended."""

    def note(self, line: str) -> None:
        """Something to know meanwhile."""

    def tick(self) -> None:
        """Called about once a second."""


class Launcher(Protocol):
    """Runs arms somewhere.

    Attributes:
        accelerator: the GPU there, as torch names it, or "cpu"; None: this machine's.
    """

    accelerator: str | None

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        """Run arms, each of which ends or fails. Whatever ends this ends all of them."""


def gpus_of(experiment: Experiment) -> int:
    """GPUs that a run takes where it has any."""
    if experiment.hardware.device == "cpu":
        return 0
    engine = experiment.engine
    return engine.tensor_parallel_size * engine.data_parallel_size
