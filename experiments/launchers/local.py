"""Arms on this machine, in processes of their own: several at once where there are GPUs or workers for them.

Whoever runs an arm has the claim on its run (`experiments.records.claims`), so that several launchers, on several
machines, may work on the same arms. The process that makes the run works under this one's claim.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments import records
from experiments.errors import one_line
from experiments.launchers.task import ELSEWHERE, Commands, Report, Task
from experiments.records import claims
from experiments.running.child import Alone, Worker, reason_of, stop

PAUSE, AGAIN = 0.05, 1.0
"""Seconds between two looks at the arms that run, and at those that other processes make."""


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(count)] if given is None else given.split(",")[:count]


@dataclass
class Running:
    """An arm on its way."""

    task: Task
    claim: claims.Claim
    process: Alone | Worker
    begin: float = field(default_factory=time.monotonic)


@dataclass
class Slot:
    """A worker: it runs one arm after another.

    Attributes:
        gpus: of its arm, or of the process that it keeps.
        kept: a process that holds a model, for arms that share it.
        shared: what such arms have in common.
    """

    name: str
    gpus: tuple[str, ...] = ()
    running: Running | None = None
    kept: Worker | None = None
    shared: str | None = None

    def close(self) -> None:
        """End the process that holds a model, if there is one."""
        if self.kept is not None:
            self.kept.close()
        self.kept = self.shared = None


class Local:
    """A `Launcher`.

    Args:
        gpus: to share out, if there are any; a lone worker leaves that to the arm.
        workers: arms at once at most.
        place: the beginning of the workers' names.
        waits: for arms that other processes make; else this leaves them to those that give a sign of life.
    """

    accelerator = None

    def __init__(
        self, commands: Commands, gpus: Sequence[str], workers: int, place: str = "", waits: bool = True
    ) -> None:
        self._commands, self._gpus, self._place, self._waits = commands, gpus, place, waits
        several = workers > 1
        self._slots = [Slot(f"worker {n + 1}" if several and not gpus else "") for n in range(workers)]
        self._blocked: dict[int, float] = {}
        """When to look again at arms that other processes make."""

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        # The largest first: smaller ones fill what is left, and none waits for many GPUs to be free at once.
        waiting = sorted(tasks, key=lambda task: -task.gpus)
        ticked, beats = time.monotonic(), {}
        try:
            while waiting or self._busy:
                while self._start_one(waiting, report):
                    pass
                time.sleep(PAUSE)
                each_second = time.monotonic() - ticked > 1.0
                for slot in self._busy:
                    self._look_at(slot, waiting, report, each_second)
                if not each_second:
                    continue
                ticked = time.monotonic()
                report.tick()
                if self._busy or not waiting:
                    beats = {}
                elif not beats:
                    report.note(f"other processes are making what is to go ({len(waiting)}): waiting for them")
                    beats = {task.number: _beat(task) for task in waiting}
                elif not self._waits and all(_beat(task) not in (None, beats[task.number]) for task in waiting):
                    return
        except BaseException:
            self._stop()
            raise
        finally:
            for slot in self._slots:
                slot.close()

    @property
    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.running is not None]

    def _start_one(self, waiting: list[Task], report: Report) -> bool:
        """Start an arm, or find one that is over. False where nothing can be started now."""
        idle = [slot for slot in self._slots if slot.running is None]
        for slot in sorted(idle, key=lambda slot: slot.kept is None):
            for task in self._in_order(slot, waiting):
                if self._blocked.get(task.number, 0.0) > time.monotonic():
                    continue
                gpus = self._room(slot, task)
                if gpus is None:
                    continue
                slot.gpus, worker = gpus, self._name(slot, gpus)
                try:
                    claim = claims.take(task.folder, worker)
                except OSError as error:
                    waiting.remove(task)
                    report.ended(task, worker, f"can't be claimed: {one_line(error)}", None)
                    return True
                if claim is None:
                    self._blocked[task.number] = time.monotonic() + AGAIN
                    continue
                waiting.remove(task)
                try:
                    if not self._is_over(task, report):
                        self._start(slot, task, claim, worker, report)
                finally:
                    if slot.running is None:
                        claim.release()
                return True
        return False

    def _in_order(self, slot: Slot, waiting: Sequence[Task]) -> list[Task]:
        """First arms that share the model that the slot holds, then those whose model nobody holds."""
        if len(self._slots) == 1:
            return list(waiting)
        held = {other.shared for other in self._slots} - {None}
        return sorted(
            waiting, key=lambda task: (task.shared is None or task.shared != slot.shared, task.shared in held)
        )

    def _room(self, slot: Slot, task: Task) -> tuple[str, ...] | None:
        """GPUs for the arm; None where there are too few now."""
        if len(self._slots) == 1 or not self._gpus:
            return ()
        if slot.shared is not None and slot.shared == task.shared and len(slot.gpus) == task.gpus:
            return slot.gpus
        taken = {gpu for other in self._busy for gpu in other.gpus}
        kept = {gpu for other in self._slots if other.kept and other is not slot for gpu in other.gpus}
        free = sorted((gpu for gpu in self._gpus if gpu not in taken), key=lambda gpu: gpu in kept)
        return tuple(free[: task.gpus]) if len(free) >= task.gpus else None

    def _name(self, slot: Slot, gpus: tuple[str, ...]) -> str:
        return ", ".join(filter(None, [self._place, f"GPU {','.join(gpus)}" if gpus else slot.name]))

    def _is_over(self, task: Task, report: Report) -> bool:
        """Whether another process has made the run since the sweep was planned; this one has the claim."""
        if report.is_over(task):
            return True
        if records.stamp(task.folder) != task.before:
            report.ended(task, ELSEWHERE, None, None)
            return True
        return False

    def _start(self, slot: Slot, task: Task, claim: claims.Claim, worker: str, report: Report) -> None:
        """Start the arm, in a process of its own or in the one that holds its model."""
        for other in self._slots:  # before another takes memory
            same = other is slot and task.shared is not None and other.shared == task.shared and not other.kept.ended
            if other.running is None and not same and (other is slot or {*other.gpus} & {*slot.gpus}):
                other.close()
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)} if self._gpus and len(self._slots) > 1 else {}
        under_claim = {claims.VARIABLE: claim.token}
        report.started(task, worker)
        try:
            if task.shared is None:
                process = Alone([*self._commands.alone, *task.overrides], visible | under_claim)
            else:
                if slot.kept is None:
                    slot.kept, slot.shared = Worker(self._commands.sharing, visible), task.shared
                process = slot.kept
                process.start(task.overrides, under_claim)
        except OSError as error:
            report.ended(task, worker, one_line(error), 0.0)
            return
        slot.running = Running(task, claim, process)

    def _look_at(self, slot: Slot, waiting: list[Task], report: Report, closely: bool) -> None:
        """See whether the slot's arm has ended, or is another process's by now and waits for that one's end."""
        running = slot.running
        task, ended = running.task, running.process.poll()
        has_failed = ended is not None and ended[0] != 0
        is_lost = (has_failed or (ended is None and closely)) and running.claim.is_lost
        if ended is None:
            if not is_lost:
                return
            stop([running.process.process])
        reason = None if is_lost else _reason(task, *ended)
        self._free(slot)
        try:
            if is_lost:
                waiting.append(task)
                line = "this process was silent for so long that another has taken it over"
                report.note(f"arm {task.number}: {line}")
            else:
                report.ended(task, self._name(slot, slot.gpus), reason, time.monotonic() - running.begin)
        finally:
            running.claim.release()  # when its end is known

    def _free(self, slot: Slot) -> None:
        if slot.running.process is not slot.kept:
            slot.running.process.close()
        elif slot.kept.ended:
            slot.close()
        slot.running = None

    def _stop(self) -> None:
        busy = self._busy
        stop([slot.running.process.process for slot in busy])
        for slot in busy:
            slot.running.claim.release()
            self._free(slot)


def _beat(task: Task) -> float | None:
    """The latest sign of life of the process that makes the run; None where there is none."""
    owner = claims.holder(task.folder)
    return None if owner is None else owner["beat"]


def log_of(folder: Path) -> Path:
    """Where the output of a failed run is kept."""
    return folder.parent / records.SWEEPS / f"{folder.name}.log"


def _reason(task: Task, code: int, output: str) -> str | None:
    """Why an arm failed, in one line, and its output in a file beside the sweep's; None where it is done."""
    log = log_of(task.folder)
    if code == 0 and records.stamp(task.folder) is not None:
        log.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output, encoding="utf-8")
    return reason_of(code, output)
