"""How arms fare on other machines, told through files in the folder that all share."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import records
from experiments.launchers.local import Local
from experiments.launchers.task import Commands, Report, Task

STOP = "stop"


class Stopped(Exception):
    """The sweep was interrupted where it was started, or has ended."""


class Board:
    """A `Report` as a file for each arm, which whoever has the claim on its run replaces.

    A worker's methods raise Stopped where the start of the sweep asks for an end, or has removed the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: dict[int, dict[str, Any]] = {}

    def started(self, task: Task, worker: str) -> None:
        self._write(task, {"worker": worker, "ended": False, "since": time.time()})

    def ended(self, task: Task, worker: str, reason: str | None, seconds: float | None) -> None:
        self._write(task, {"worker": worker, "ended": True, "reason": reason, "seconds": seconds})

    def is_over(self, task: Task) -> bool:
        self._ask_again()
        said = self._read(task)
        return said is not None and said["ended"]

    def note(self, line: str) -> None:
        return

    def tick(self) -> None:
        self._ask_again()
        if (self.folder / STOP).exists():
            raise Stopped

    def stop(self) -> None:
        """Ask all workers to end."""
        (self.folder / STOP).touch()

    def tell(self, tasks: Sequence[Task], report: Report) -> list[Task]:
        """Pass on what is new of these arms. Returns those that have not ended."""
        self._ask_again()
        left = []
        for task in tasks:
            said, before = self._read(task), self._told.get(task.number)
            if said is not None and said != before:
                self._told[task.number] = said
                if not said["ended"] or (before is None and said["seconds"] is not None):
                    report.started(task, said["worker"])
                if said["ended"]:
                    report.ended(task, said["worker"], said["reason"], said["seconds"])
            if said is None or not said["ended"]:
                left.append(task)
        return left

    def worker_of(self, task: Task) -> str | None:
        """Who began the arm last, as `tell` has found."""
        return self._told.get(task.number, {}).get("worker")

    def _ask_again(self) -> None:
        try:
            records.ask_again(self.folder)
        except FileNotFoundError:
            raise Stopped from None

    def _write(self, task: Task, said: dict[str, Any]) -> None:
        try:
            records.write_json(self._path(task), said)
        except FileNotFoundError:
            raise Stopped from None

    def _read(self, task: Task) -> dict[str, Any] | None:
        while True:
            try:
                return json.loads(self._path(task).read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.ESTALE:  # another machine has replaced the file after it was opened
                    raise

    def _path(self, task: Task) -> Path:
        return self.folder / f"{task.number}.json"


def work(
    tasks: Sequence[Task], commands: Commands, cwd: Path, board: Path, name: str, gpus: Sequence[str] = ()
) -> None:
    """Run what is left of arms on this machine, which other machines may share, and tell a board.

    Args:
        cwd: where the sweep was started: relative paths are meant from there.
        board: the board's folder.
        name: of this worker.
        gpus: to share out among arms side by side; none: one arm at a time, on what it finds.
    """
    os.chdir(cwd)
    report = Board(board)
    with contextlib.suppress(Stopped):
        report.tick()
        Local(commands, gpus, max(1, len(gpus)), place=name, waits=False).run(tasks, report)
