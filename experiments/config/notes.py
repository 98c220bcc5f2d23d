"""Settings that are allowed but hardly ever meant: named before a run, and again beside its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from experiments.config.options import asked_budgets, asked_intervals, held_budgets, held_intervals, simulated
from experiments.errors import one_line
from experiments.graders import GRADERS
from experiments.running.traces import read_trace
from experiments.workloads import READERS
from zipage import is_enlarged

if TYPE_CHECKING:
    import pandas as pd

    from experiments.config.schema import Experiment
    from experiments.workloads import Problem


def notes_before(experiment: Experiment, problems: Sequence[Problem]) -> list[str]:
    """A line for each thing to know before the run."""
    found = [check(experiment) for check in (_budget_rounding, _interval_rounding, _equal_samples, _trace)]
    return [line for line in (*found, _golds(experiment.workload.grader, problems)) if line]


def notes_on(runs: pd.DataFrame) -> list[str]:
    """A line for each thing to know of these rows of `load_runs()`."""

    def column(name: str) -> pd.Series:
        return runs.reindex(columns=[name]).astype(float).iloc[:, 0]

    rounded = is_enlarged(held_budgets(runs), asked_budgets(runs)).sum()
    spaced = is_enlarged(held_intervals(runs), asked_intervals(runs)).sum()
    equal = ((column("sampling.n") > 1) & (column("sampling.temperature") == 0)).sum()
    ungraded, unmeasured = column("grader_errors").sum(), column("fidelity.worked_unmeasured").sum()
    misranked = sum(column(f"{of}counters.compressions_misranked").sum() for of in ("", "worked_"))
    unanswered = column("unanswered_turns").sum()
    modelled = simulated(runs).sum()
    lines = {
        f"{_runs(modelled)} simulated: times are those of a model, not measured (docs/simulator.md)": modelled,
        f"whole blocks made the budget of {_runs(rounded)} more than 5 % larger than was asked for; "
        "budgets here are those that held": rounded,
        f"whole blocks made policy.interval of {_runs(spaced)} more than 5 % larger than was asked for": spaced,
        f"{_runs(equal)} drew several samples a problem at temperature 0: unless a policy draws at random, the samples "
        "of a problem are equal": equal,
        "1 sample could not be graded and counts as wrong"
        if ungraded == 1
        else f"{ungraded:.0f} samples could not be graded and count as wrong": ungraded,
        f"conversations outgrew the context before {unanswered:.0f} of their turns, which count as wrong": unanswered,
        "1 worked solution could not be measured"
        if unmeasured == 1
        else f"{unmeasured:.0f} worked solutions could not be measured": unmeasured,
        f"in {misranked:.0f} compressions a policy ranked entries NaN, so chance decided what they kept": misranked,
    }
    return [line for line, count in lines.items() if count]


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _budget_rounding(experiment: Experiment) -> str | None:
    asked = experiment.sampling.budget_tokens
    if asked is not None:
        return _rounding(experiment, "sampling.budget_tokens", asked)
    return _rounding(experiment, "policy.budget_tokens", experiment.policy.budget_tokens)


def _interval_rounding(experiment: Experiment) -> str | None:
    return _rounding(experiment, "policy.interval", experiment.policy.interval)


def _rounding(experiment: Experiment, option: str, asked: int | None) -> str | None:
    if (experiment.sampling.policy or experiment.policy.name) == "full" or asked is None:
        return None
    size = experiment.engine.block_size
    held = -(-asked // size) * size
    if not is_enlarged(held, asked):
        return None
    return (
        f"{option}={asked}: whole blocks of {size} make it {held}, {held / asked - 1:.0%} more; "
        "a smaller engine.block_size comes closer"
    )


def _equal_samples(experiment: Experiment) -> str | None:
    sampling = experiment.sampling
    if sampling.n == 1 or sampling.temperature > 0:
        return None
    return (
        f"sampling.n={sampling.n} at temperature 0: unless the policy draws at random, the samples of a problem are "
        "equal; sampling=nucleus draws different ones, sampling.n=1 asks once"
    )


def _trace(experiment: Experiment) -> str | None:
    scenario = experiment.scenario
    if experiment.workload.generator in READERS:
        trace, name = read_trace(experiment.workload.path), f"workload.path={experiment.workload.path}"
        return None if not trace.failed else f"{name}: failed requests, without tokens, are left out: {trace.failed}"
    if scenario.arrival != "trace" or not (columns := read_trace(scenario.path).more):
        return None
    return (
        f"scenario.path={scenario.path}: only arrivals are read of it, not {', '.join(columns)}; "
        "workload=trace makes requests as long as those of the trace"
    )


def _golds(name: str, problems: Sequence[Problem]) -> str | None:
    asked = [problem for problem in problems if problem.error is None]
    faults = [(problem.id, fault) for problem in asked if (fault := _fault(GRADERS[name], problem.gold))]
    if not faults:
        return None
    return (
        f"workload.grader={name}: can't read {len(faults)} of {len(asked)} golds, whose answers score 0; the first is "
        "{}: {}".format(*faults[0])
    )


@lru_cache(maxsize=1 << 14)
def _fault(grader: Callable[[str, str], object], gold: str) -> str | None:
    """Why the grader can't grade by this gold; None where it can. An empty answer runs nothing."""
    try:
        grader("", gold)
    except Exception as error:
        return one_line(error)
    return None
