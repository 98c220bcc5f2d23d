"""A sweep: one run after another, each in a process of its own, or, where that is asked for, around one loaded model.

What a sweep has done is what the results folder holds: a run is known by its id, so a sweep that was stopped, however
that was, goes on when it is started again. Its processes end with it, also when it is killed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from experiments import records
from experiments.backends import BackendFactory
from experiments.command_line import INTERRUPTED
from experiments.config.arms import Arm, expand
from experiments.config.compose import load_experiment
from experiments.config.schema import Experiment
from experiments.errors import UsageError, one_line
from experiments.records.sources import Standing
from experiments.reporting.runs_table import sweep_table
from experiments.running import job
from experiments.running.child import Worker, reason_of, run_child
from experiments.running.models import find_model
from experiments.running.plan_text import WIDTH, arm_names, plan_lines
from experiments.running.progress import Progress, clock, columns
from experiments.workloads import load_problems

RUN = (sys.executable, "-m", "experiments.run")
WORKER = (sys.executable, "-m", "experiments.running.worker")
SHARE = "share_model"
"""`+share_model=true`: arms of Zipage on the same model and hardware follow each other in one process."""
ALIKE = ("model.name", "workload.name", "limit", "sampling.n", "sampling.max_tokens", "hardware.device")
"""Runs that are equal in these options take about as long as each other."""


def run(
    names: Sequence[str], arguments: Sequence[str], backends: Mapping[str, BackendFactory], child: Sequence[str] = RUN,
    worker: Sequence[str] = WORKER, dry_run: bool = False,
) -> int:  # fmt: skip
    """Run the arms of the joined sweeps that are not done yet, and print the table of all.

    Args:
        names: of sweeps (see `experiments.config.arms`).
        arguments: overrides for every arm, and `+share_model=true`.
        child: the command that makes one run of the overrides after it.
        worker: the command of an `experiments.running.child.Worker` that makes one after another.
        dry_run: print the plan and stop.

    Returns:
        The exit code: 0 all arms are done, 1 some failed, 130 interrupted.

    Raises:
        UsageError: the sweep can't be done as asked; nothing was run.
    """
    shares, arguments = _asks_to_share(arguments)
    sweep = None
    try:
        arms = plan(names, arguments, backends)
        sweep = Sweep("+".join(Path(name).stem for name in names), arms, child, worker if shares else None)
        if dry_run:
            sweep.print_plan()
            return 0
        sweep.write()
        return sweep.run()
    except KeyboardInterrupt:
        got = "nothing was run" if sweep is None else f"{sweep.done} of {counted(arms)} recorded"
        print(f"\nerror: interrupted: {got}, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        if sweep is not None:
            sweep.close()


def _asks_to_share(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether arms share a model, and the rest of the arguments."""
    asked = [argument for argument in arguments if argument.lstrip("+").partition("=")[0] == SHARE]
    values = {argument.partition("=")[2].lower() for argument in asked}
    if not values <= {"true", "false"} or len(values) > 1:
        raise UsageError(f"{' '.join(asked)}: must be +{SHARE}=true or +{SHARE}=false")
    return values == {"true"}, [argument for argument in arguments if argument not in asked]


@dataclass(frozen=True)
class PlannedRun:
    """An arm, where its record lies or will lie, and what there is of it."""

    overrides: Arm
    experiment: Experiment
    folder: Path
    standing: Standing
    notes: tuple[str, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether it must be run."""
        return not self.standing.is_kept(self.experiment.force)

    @property
    def kind(self) -> tuple[Any, ...]:
        return attrgetter(*ALIKE)(self.experiment)

    @property
    def shared(self) -> str | None:
        """Equal for arms that may share a loaded model; None for one that may not: only Zipage can be shut down, and
        replicas and ranks load the model in processes of their own.
        """
        experiment, engine = self.experiment, self.experiment.engine
        if experiment.backend != "zipage" or engine.data_parallel_size > 1 or engine.tensor_parallel_size > 1:
            return None
        drawn = experiment.seed if experiment.model.load_format == "dummy" else None
        return repr((experiment.model, experiment.hardware, experiment.engine.dtype, drawn))


def plan(names: Sequence[str], arguments: Sequence[str], backends: Mapping[str, BackendFactory]) -> list[PlannedRun]:
    """Compose and check every arm, without loading a model. Arms that mean the same run are one.

    Raises:
        UsageError: an arm can't be run as asked; the line names the sweep, the arm and the option.
    """
    problems, model = remembered(load_problems), remembered(find_model)
    planned: dict[Path, PlannedRun] = {}
    for number, overrides in enumerate(expand(names, arguments), 1):
        try:
            prepared = job.prepare(load_experiment(overrides), backends, problems, model)
            folder = prepared.folder
            if folder not in planned:
                standing, notes = prepared.standing, tuple(prepared.notes)
                planned[folder] = PlannedRun(overrides, prepared.experiment, folder, standing, notes)
        except UsageError as error:
            raise UsageError(f"sweep {', '.join(names)}: arm {number} ({' '.join(overrides)}): {error}") from error
    if len({arm.folder.parent for arm in planned.values()}) > 1:
        raise UsageError(f"sweep {', '.join(names)}: results_dir: must be one folder for all arms")
    return list(planned.values())


class Sweep:
    """Arms on their way.

    Attributes:
        path: the sweep's record, a list of its arms and their runs; it has nothing that changes.
    """

    def __init__(
        self, name: str, arms: Sequence[PlannedRun], child: Sequence[str], worker: Sequence[str] | None = None
    ) -> None:
        self.name, self.arms, self.child, self.worker = name, arms, child, worker
        self._working: tuple[str, Worker] | None = None
        """The process that holds a model, and what arms must have in common to run there."""
        digest = records.content_hash([arm.folder.name for arm in arms])
        self.path = arms[0].folder.parent / records.SWEEPS / f"{records.shortened(name)}-{digest[:12]}.json"
        self.names = dict(zip([arm.folder for arm in arms], arm_names([arm.overrides for arm in arms]), strict=True))
        """What sets each arm apart from the others."""
        self.done = 0
        """Arms that are recorded."""
        self.started = time.monotonic()
        self.seconds: dict[tuple[Any, ...], list[float]] = {}
        """Seconds that runs of each kind have taken."""

    def write(self) -> None:
        """Write the record. Raises UsageError where it can't be written."""
        arms = [{"overrides": list(arm.overrides), "run": arm.folder.name} for arm in self.arms]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records.write_json(self.path, {"sweep": self.name, "arms": arms})
        except OSError as error:
            raise UsageError(f"{self.path}: can't be written: {error.strerror or error}") from error

    def run(self) -> int:
        """Returns the exit code."""
        waiting = self.print_plan()
        failures = 0
        progress = Progress(len(self.arms))
        try:
            for number, arm in enumerate(self.arms, 1):
                if arm not in waiting:
                    continue
                waiting.remove(arm)
                title = f"arm {number} of {len(self.arms)}: {self.names[arm.folder]}"
                begin = time.monotonic()

                def show(arm: PlannedRun = arm, title: str = title, begin: float = begin) -> None:
                    done = len(self.arms) - len(waiting) - 1
                    left = self._seconds_left(waiting, arm, time.monotonic() - begin)
                    progress.show(title, done, len(self.arms), time.monotonic() - self.started, left)

                reason = self._run_arm(arm, show)
                seconds = time.monotonic() - begin
                if reason is None:
                    self.done += 1
                    self.seconds.setdefault(arm.kind, []).append(seconds)
                else:
                    failures += 1
                    progress.say(f"error: {title}: {reason}", error=True)
                outcome = "failed" if reason else _figures(arm.folder)
                progress.say(f"{title}: {outcome}; {clock(seconds)}, {self._to_go(waiting)}")
        finally:
            progress.close()
        print(f"\nsweep: {self.path}\n{sweep_table(self.path)}", flush=True)
        if failures:
            print(
                f"{failures} of {counted(self.arms)} failed: see the errors above, and RUN.log beside the sweep's file"
            )
        return int(bool(failures))

    def print_plan(self) -> list[PlannedRun]:
        """Print what there is to do. Returns the arms that must be run."""
        kinds = {arm.kind for arm in self.arms}
        for run in records.load_runs(self.path.parents[1]).to_dict("records"):
            kind = tuple(None if run.get(name) != run.get(name) else run.get(name) for name in ALIKE)  # no NaN
            seconds = (run.get("load_seconds") or 0.0) + (run.get("seconds") or 0.0)
            if kind in kinds and seconds > 0:  # neither absent nor NaN
                self.seconds.setdefault(kind, []).append(seconds)
        waiting = [arm for arm in self.arms if arm.waits]
        self.done = len(self.arms) - len(waiting)
        width = min(WIDTH, (columns() or WIDTH + 1) - 1)
        print(fill(f"sweep {self.name}: {counted(self.arms)}, {self.done} done, {self._to_go(waiting)}", width))
        states = ["" if arm.standing.state == "missing" else arm.standing.state for arm in self.arms]
        print(*plan_lines([arm.overrides for arm in self.arms], states, width), sep="\n", flush=True)
        reasons = Counter((arm.standing.state, arm.standing.reason) for arm in self.arms if arm.standing.reason)
        for (state, reason), count in reasons.items():
            print(fill(f"  {count} {state}: {reason}; force=stale runs such arms again", width), flush=True)
        for note in dict.fromkeys(note for arm in self.arms for note in arm.notes):
            print(fill(f"note: {note}", width, subsequent_indent="  ", break_on_hyphens=False), flush=True)
        return waiting

    def _run_arm(self, arm: PlannedRun, tick: Callable[[], object]) -> str | None:
        """Run one arm. Returns None when it is done, else why not, in one line."""
        try:
            code, output = self._carry_out(arm, tick)
        except OSError as error:
            return one_line(error)
        log = self.path.with_name(f"{arm.folder.name}.log")
        if code == 0 and records.is_complete(arm.folder):
            log.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            log.write_text(output, encoding="utf-8")
        return reason_of(code, output)

    def _carry_out(self, arm: PlannedRun, tick: Callable[[], object]) -> tuple[int, str]:
        """The exit code and output of the arm, in a process of its own or in the one that holds its model."""
        overrides = [*arm.overrides, *self._group(arm)]
        if self._working and (self._working[0] != arm.shared or self._working[1].ended):
            self.close()  # before another takes memory
        if self.worker is None or arm.shared is None:
            return run_child([*self.child, *overrides], tick)
        if self._working is None:
            self._working = arm.shared, Worker(self.worker)
        return self._working[1].run(overrides, tick)

    def close(self) -> None:
        """End the process that holds a model, if there is one."""
        if self._working:
            self._working[1].close()
            self._working = None

    def _group(self, arm: PlannedRun) -> list[str]:
        """The override that gathers the sweep's runs in wandb, where they go there without a group of their own."""
        tracking = arm.experiment.tracking
        return [f"tracking.group={self.path.stem}"] if tracking.backend == "wandb" and tracking.group is None else []

    def _to_go(self, waiting: Sequence[PlannedRun]) -> str:
        """How many arms wait, and for how long where that is known."""
        if not waiting:
            return "nothing to go"
        left = self._seconds_left(waiting)
        return f"{len(waiting)} to go" + ("" if left is None else f", about {clock(left)}")

    def _seconds_left(
        self, waiting: Sequence[PlannedRun], running: PlannedRun | None = None, spent: float = 0.0
    ) -> float | None:
        """The time that arms will take, by those of their kind, or else by all that are known; None: none is."""
        known = [seconds for kind in self.seconds.values() for seconds in kind]
        if not known:
            return None
        takes = [mean(self.seconds.get(arm.kind, known)) for arm in (*waiting, *([running] if running else ()))]
        return sum(takes[: len(waiting)]) + (max(0.0, takes[-1] - spent) if running else 0.0)


def counted(arms: Sequence[PlannedRun]) -> str:
    return "1 arm" if len(arms) == 1 else f"{len(arms)} arms"


def _figures(folder: Path) -> str:
    """The summary of a finished arm: its accuracy, where it was graded, and its tokens/s."""
    runs = records.load_runs(folder).reindex(columns=["accuracy", "output_tokens_per_second"]).astype(float)
    found = []
    for accuracy, rate in runs.itertuples(index=False):
        found += [f"{accuracy:.1%} right"] if accuracy == accuracy else []  # no NaN
        found += [f"{rate:,.1f} tokens/s"] if rate == rate else []
    return ", ".join(found) or "done"


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works out each answer once: arms share models, whose files are hashed, and data sets."""
    answers: dict[str, Any] = {}

    def remembered(*arguments: Any) -> Any:
        key = repr(arguments)
        if key not in answers:
            answers[key] = function(*arguments)
        return answers[key]

    return remembered
