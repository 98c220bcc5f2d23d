"""A sweep: its plan, what is said of it on the way, and its table. A launcher runs its arms (`experiments.launchers`).

What a sweep has done is what the results folder holds: a run is known by its id, so a sweep that was stopped, however
that was, goes on when it is started again. Its processes end with it, also when it is killed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from experiments.errors import UsageError
from experiments.launchers import open_launcher
from experiments.launchers.task import Commands, Launcher, Task, gpus_of
from experiments.records.sources import Standing
from experiments.reporting.runs_table import sweep_table
from experiments.running import job
from experiments.running.models import find_model
from experiments.running.plan_text import WIDTH, arm_names, plan_lines
from experiments.running.progress import Progress, clock, columns
from experiments.workloads import load_problems

RUN = (sys.executable, "-m", "experiments.run")
WORKER = (sys.executable, "-m", "experiments.running.worker")
SHARE = "share_model"
"""`+share_model=true`: arms of Zipage on the same model and hardware follow each other in one process."""
ARMS = "arms"
"""`+arms=[1,3]`: these arms alone, by their numbers in the plan."""
ALIKE = ("model.name", "workload.name", "limit", "sampling.n", "sampling.max_tokens", "hardware.device")
"""Runs that are equal in these options take about as long as each other."""


def run(
    names: Sequence[str], arguments: Sequence[str], backends: Mapping[str, BackendFactory], child: Sequence[str] = RUN,
    worker: Sequence[str] = WORKER, dry_run: bool = False,
) -> int:  # fmt: skip
    """Run the arms of the joined sweeps that are not done yet, and print the table of all.

    Args:
        names: of sweeps (see `experiments.config.arms`).
        arguments: overrides for every arm, `+share_model=true`, and `+arms=[N,N]`.
        child: the command that makes one run of the overrides after it.
        worker: the command of an `experiments.running.child.Worker` that makes one after another.
        dry_run: print the plan and stop.

    Returns:
        The exit code: 0 all arms are done, 1 some failed, 130 interrupted.

    Raises:
        UsageError: the sweep can't be done as asked; nothing was run.
    """
    shares, arguments = _asks_to_share(arguments)
    numbers, arguments = _asks_for_arms(arguments)
    sweep = None
    try:
        name, jobs = "+".join(Path(name).stem for name in names), prepare(names, arguments, backends)
        of = len({job.folder for _, job in jobs})
        jobs = jobs if numbers is None else _chosen(names, jobs, numbers)
        config = jobs[0][1].experiment.launcher
        if dry_run:
            Sweep(name, place(names, jobs, config.accelerator, numbers), of).print_plan()
            return 0
        commands = Commands(tuple(child), tuple(worker))
        with open_launcher(config, commands, [job.experiment for _, job in jobs], shares) as launcher:
            arms = place(names, jobs, launcher.accelerator, numbers)
            sweep = Sweep(name, arms, of, shares)
            sweep.write()
            return sweep.run(launcher)
    except KeyboardInterrupt:
        got = "nothing was run" if sweep is None else f"{sweep.done} of {counted(arms)} recorded"
        print(f"\nerror: interrupted: {got}, and the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _asks_to_share(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether arms share a model, and the rest of the arguments."""
    asked, rest = _taken_out(SHARE, arguments)
    values = {argument.partition("=")[2].lower() for argument in asked}
    if not values <= {"true", "false"} or len(values) > 1:
        raise UsageError(f"{' '.join(asked)}: must be +{SHARE}=true or +{SHARE}=false")
    return values == {"true"}, rest


def _asks_for_arms(arguments: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """Numbers of the arms that are asked for, None for all, and the rest of the arguments."""
    asked, rest = _taken_out(ARMS, arguments)
    if not asked:
        return None, rest
    numbers = asked[0].partition("=")[2].removeprefix("[").removesuffix("]").replace(" ", "").split(",")
    if len(asked) > 1 or not all(number.isdecimal() for number in numbers):
        raise UsageError(f"{' '.join(asked)}: must be numbers of arms, such as +{ARMS}=[1,3]; --dry-run shows them")
    return sorted(set(map(int, numbers))), rest


def _taken_out(name: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that set `name`, and the others."""
    asked = [argument for argument in arguments if argument.lstrip("+").partition("=")[0] == name]
    return asked, [argument for argument in arguments if argument not in asked]


def _chosen(names: Sequence[str], jobs: Sequence[tuple[Arm, job.Job]], numbers: Sequence[int]) -> list:
    """The arms of these numbers in the plan, where arms that mean the same run are one."""
    distinct: dict[Path, tuple[Arm, job.Job]] = {}
    for arm in jobs:
        distinct.setdefault(arm[1].folder, arm)
    for number in numbers:
        if not 1 <= number <= len(distinct):
            raise UsageError(
                f"+{ARMS}: no arm {number}: sweep {', '.join(names)} has {len(distinct)}; --dry-run shows them"
            )
    arms = list(distinct.values())
    return [arms[number - 1] for number in numbers]


@dataclass(frozen=True)
class PlannedRun:
    """An arm, where its record lies or will lie, and what there is of it.

    Attributes:
        number: in the plan of the whole sweep, from 1, also where some of its arms are run alone.
    """

    number: int
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
    """The arms of joined sweeps as they are run here.

    Raises:
        UsageError: an arm can't be run as asked; the line names the sweep, the arm and the option.
    """
    return place(names, prepare(names, arguments, backends))


def prepare(
    names: Sequence[str], arguments: Sequence[str], backends: Mapping[str, BackendFactory]
) -> list[tuple[Arm, job.Job]]:
    """Compose and check every arm, without loading a model. Raises as `plan`."""
    problems, model = remembered(load_problems), remembered(find_model)
    jobs = []
    for number, overrides in enumerate(expand(names, arguments), 1):
        with _named(names, number, overrides):
            jobs.append((overrides, job.prepare(load_experiment(overrides), backends, problems, model)))
    for option in ("results_dir", "launcher"):
        if len({repr(getattr(job.experiment, option)) for _, job in jobs}) > 1:
            raise UsageError(f"sweep {', '.join(names)}: {option}: must be one for all arms")
    return jobs


def place(
    names: Sequence[str], jobs: Sequence[tuple[Arm, job.Job]], accelerator: str | None = None,
    numbers: Sequence[int] | None = None,
) -> list[PlannedRun]:  # fmt: skip
    """Where the arms' records lie, and what there is of them. Arms that mean the same run are one. Raises as `plan`.

    Args:
        accelerator: where they are run (see `job.Job`).
        numbers: of these arms in the whole sweep; None: they are all of it.
    """
    planned: dict[Path, PlannedRun] = {}
    for i, (overrides, prepared) in enumerate(jobs):
        number = len(planned) + 1 if numbers is None else numbers[i]
        with _named(names, number, overrides):
            prepared = replace(prepared, accelerator=accelerator)
            folder = prepared.folder
            if folder not in planned:
                standing, notes = prepared.standing, tuple(prepared.notes)
                own = tuple(override for override in overrides if not _launches(override))
                planned[folder] = PlannedRun(number, own, prepared.experiment, folder, standing, notes)
    return list(planned.values())


@contextlib.contextmanager
def _named(names: Sequence[str], number: int, overrides: Arm) -> Iterator[None]:
    """Makes a UsageError name the sweep and the arm."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"sweep {', '.join(names)}: arm {number} ({' '.join(overrides)}): {error}") from error


def _launches(override: str) -> bool:
    """Whether an override is the sweep's, and no option of a run."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0] == "launcher"


class Sweep:
    """Arms on their way. It hears of them as a `launchers.task.Report`.

    Attributes:
        arms: by their numbers.
        path: the sweep's record, a list of its arms and their runs; it has nothing that changes.
        done: arms that are recorded.
    """

    def __init__(self, name: str, arms: Sequence[PlannedRun], of: int, shares: bool = False) -> None:
        self.name, self._shares = name, shares
        self.arms = {arm.number: arm for arm in arms}
        digest = records.content_hash([arm.folder.name for arm in arms])
        self.path = arms[0].folder.parent / records.SWEEPS / f"{records.shortened(name)}-{digest[:12]}.json"
        names = arm_names([arm.overrides for arm in arms])
        self._titles = {number: f"arm {number} of {of}: {said}" for number, said in zip(self.arms, names)}
        """Each with what sets the arm apart from the others."""
        self.done = 0
        self._failures = 0
        self._waiting: list[int] = []
        self._running: dict[int, float] = {}
        """Numbers of arms, and when those that run began."""
        self._begin = time.monotonic()
        self._seconds: dict[tuple[Any, ...], list[float]] = {}
        """Seconds that runs of each kind have taken."""

    @cached_property
    def _progress(self) -> Progress:
        """Which a terminal shows from the first word on."""
        return Progress(len(self.arms))

    def write(self) -> None:
        """Write the record. Raises UsageError where it can't be written."""
        arms = [{"overrides": list(arm.overrides), "run": arm.folder.name} for arm in self.arms.values()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records.write_json(self.path, {"sweep": self.name, "arms": arms})
        except OSError as error:
            raise UsageError(f"{self.path}: can't be written: {error.strerror or error}") from error

    def run(self, launcher: Launcher) -> int:
        """Returns the exit code."""
        tasks = self._tasks()
        try:
            launcher.run(tasks, self)
        finally:
            self._progress.close()
        print(f"\nsweep: {self.path}\n{sweep_table(self.path)}", flush=True)
        if self._failures:
            print(
                f"{self._failures} of {counted(self.arms)} failed: see the errors above, and RUN.log beside the "
                "sweep's file"
            )
        return int(bool(self._failures))

    def _tasks(self) -> list[Task]:
        """The arms that must be run; the plan is printed."""
        self.print_plan()
        tasks = []
        for number in self._waiting:
            arm = self.arms[number]
            overrides, shared = (*arm.overrides, *self._group(arm)), arm.shared if self._shares else None
            before = records.stamp(arm.folder)
            tasks.append(Task(number, overrides, arm.folder, before, shared, gpus_of(arm.experiment)))
        return tasks

    def started(self, task: Task, worker: str) -> None:
        again = " again" * (task.number not in self._waiting)
        if not again:
            self._waiting.remove(task.number)
        self._running[task.number] = time.monotonic()
        if worker:
            self._progress.say(f"{self._titles[task.number]}: begins{again} on {worker}")

    def ended(self, task: Task, worker: str, reason: str | None, seconds: float | None) -> None:
        arm, title = self.arms[task.number], self._titles[task.number]
        self._running.pop(task.number, None)
        if task.number in self._waiting:
            self._waiting.remove(task.number)
        if reason is None:
            self.done += 1
            if seconds is not None:
                self._seconds.setdefault(arm.kind, []).append(seconds)
        else:
            self._failures += 1
            self._progress.say(f"error: {title}: {reason}", error=True)
        outcome = "failed" if reason else _figures(arm.folder)
        took = ", ".join(filter(None, [None if seconds is None else clock(seconds), worker and f"on {worker}"]))
        self._progress.say(f"{title}: {outcome}; {took}, {self._to_go()}")

    def is_over(self, task: Task) -> bool:
        return False

    def note(self, line: str) -> None:
        self._progress.say(line)

    def tick(self) -> None:
        titles = [self._titles[number] for number in self._running]
        if not titles:
            return
        what = titles[0] if len(titles) == 1 else f"{len(titles)} arms at once"
        ended = len(self.arms) - len(self._waiting) - len(titles)
        self._progress.show(what, ended, len(self.arms), time.monotonic() - self._begin, self._seconds_left())

    def print_plan(self) -> None:
        """See what there is to do, and print it."""
        arms = self.arms.values()
        kinds = {arm.kind for arm in arms}
        for run in records.load_runs(self.path.parents[1]).to_dict("records"):
            kind = tuple(None if run.get(name) != run.get(name) else run.get(name) for name in ALIKE)  # no NaN
            seconds = (run.get("load_seconds") or 0.0) + (run.get("seconds") or 0.0)
            if kind in kinds and seconds > 0:  # neither absent nor NaN
                self._seconds.setdefault(kind, []).append(seconds)
        self._waiting = [number for number, arm in self.arms.items() if arm.waits]
        self.done = len(self.arms) - len(self._waiting)
        width = min(WIDTH, (columns() or WIDTH + 1) - 1)
        print(fill(f"sweep {self.name}: {counted(self.arms)}, {self.done} done, {self._to_go()}", width))
        states = ["" if arm.standing.state == "missing" else arm.standing.state for arm in arms]
        print(*plan_lines([arm.overrides for arm in arms], states, width, list(self.arms)), sep="\n", flush=True)
        reasons = Counter((arm.standing.state, arm.standing.reason) for arm in arms if arm.standing.reason)
        for (state, reason), count in reasons.items():
            print(fill(f"  {count} {state}: {reason}; force=stale runs such arms again", width), flush=True)
        for note in dict.fromkeys(note for arm in arms for note in arm.notes):
            print(fill(f"note: {note}", width, subsequent_indent="  ", break_on_hyphens=False), flush=True)

    def _group(self, arm: PlannedRun) -> list[str]:
        """The override that gathers the sweep's runs in wandb, where they go there without a group of their own."""
        tracking = arm.experiment.tracking
        return [f"tracking.group={self.path.stem}"] if tracking.backend == "wandb" and tracking.group is None else []

    def _to_go(self) -> str:
        """How many arms have not ended, and for how long where that is known."""
        count = len(self._waiting) + len(self._running)
        if not count:
            return "nothing to go"
        left = self._seconds_left()
        return f"{count} to go" + ("" if left is None else f", about {clock(left)}")

    def _seconds_left(self) -> float | None:
        """The time that arms will take, by those of their kind, or else by all that are known; None: none is."""
        known = [seconds for kind in self._seconds.values() for seconds in kind]
        if not known:
            return None
        now = time.monotonic()

        def takes(number: int) -> float:
            return mean(self._seconds.get(self.arms[number].kind, known))

        running = [max(0.0, takes(number) - (now - begin)) for number, begin in self._running.items()]
        shared = sum([*running, *map(takes, self._waiting)]) / max(1, len(running))
        return max([shared, *running])


def counted(arms: Collection[Any]) -> str:
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
