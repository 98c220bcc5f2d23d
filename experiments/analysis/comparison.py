"""Runs against their baselines: accuracy with its interval, what it cost, and whether eviction lost any."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.analysis import fidelity
from experiments.analysis.baselines import devices, full_kv, random_of_as_many_bytes, random_with_prompt
from experiments.analysis.bootstrap import check_share
from experiments.analysis.fidelity import FIGURES
from experiments.analysis.samples import Samples, read_samples
from experiments.analysis.statistics import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
    difference_intervals,
    mean_intervals,
    non_inferiority,
    power_warning,
)
from experiments.config.options import held_budgets, varied_options

logger = logging.getLogger(__name__)

RECORDED = (
    *("run", "path", "model.name", "workload.name", "policy.name", "policy.protection", "policy.budget_tokens"),
    *(
        "provenance.data",
        "provenance.calibration",
        "output_length.mean",
        "budget_bound_share",
        "place_accuracy",
        "recall_accuracy",
        "output_tokens_per_second",
        "kv_bytes.mean",
        "kv_bytes.max",
    ),
    *("rate.offered", "rate.achieved"),
    *(f"{name}.{figure}" for name in ("ttft", "tpot", "itl", "e2e") for figure in ("mean", "p50", "p90", "p99", "max")),
)
"""Columns of `load_runs()` that are taken over."""

AGAINST = ("run", "difference", "low", "high", "verdict", "power_warning")
DERIVED = (
    *(
        "budget",
        "device",
        "problems",
        "graded",
        "accuracy",
        "accuracy.low",
        "accuracy.high",
        "cap_hit_share",
        "loop_rate",
    ),
    *(f"{baseline}.{name}" for baseline in ("full", "random", "bytes") for name in AGAINST),
    *(f"{figure}{bound}" for figure in FIGURES for bound in ("", ".low", ".high")),
    *("output_length.inflation", "goodput", "slo_goodput", "slo_share", "slo_rate", "correct_per_gpu_hour"),
)
_TEXTS = ("device", ".run", ".verdict", ".power_warning")

_BATCH = 512
"""Runs whose intervals are computed at once."""


def compare(
    runs: pd.DataFrame,
    margin: float = 0.02,
    *,
    ttft: float | None = None,
    tpot: float | None = None,
    e2e: float | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> pd.DataFrame:
    """One row for each run, in order and with its index.

    Args:
        runs: rows of `load_runs()`. Baselines are looked for among them, as `experiments.analysis.baselines` says.
        margin: of non-inferiority, fixed before the runs.
        ttft, tpot, e2e: seconds that an answer may take at most to count in `slo_goodput`, `slo_share` and `slo_rate`;
            None sets no limit.
        confidence, resamples, seed: of all intervals, see `experiments.analysis.statistics`.

    Returns:
        The columns `RECORDED` and each option in which the runs differ as they are, then those below. What can't be
        known is null: accuracy where nothing is graded, differences where there is no baseline or its problems are
        others.

        budget: entries per layer and KV head that a compression left, the budget in whole blocks; null under full KV.
        device: name of the GPU, or "cpu".
        problems, graded: with a grade, and samples with one.
        accuracy, accuracy.low, accuracy.high: pass@1.
        cap_hit_share, loop_rate: shares of the answered samples that were cut at the longest length, and that end in a
            loop. Where the record has no `loop_rate` its tokens are read, which takes longer.
        full.run, full.difference, full.low, full.high, full.verdict, full.power_warning: the baseline under full KV,
            accuracy less its accuracy, paired by problem, and what `non_inferiority` and `power_warning` say.
        random.run, ...: the same against random eviction of the same budget that protects the prompt.
        bytes.run, ...: the same against random eviction that protects the prompt and holds as many bytes, as
            `random_of_as_many_bytes` of `experiments.analysis.baselines` says.
        output_length.inflation: mean output length over that of full KV.
        goodput, slo_goodput: right answers per second, and those in time. A grade between 0 and 1 counts in part.
        slo_share, slo_rate: share of the requests that were answered in time with all their samples, and how many a
            second, whatever their grades. Null of a steady state, of which only short requests end.
        divergence, agreement, loss, worked_divergence, worked_loss, each with .low and .high: how close the run
            stayed to full KV on the same text, as `experiments.analysis.fidelity` defines them.
        correct_per_gpu_hour: right answers per hour and device, loading left out. On a CPU that is an hour of the
            whole machine.

    Raises:
        ValueError: the margin or an option of the intervals is outside its range.
    """
    check_share("margin", margin)
    if runs.empty:
        return runs.reindex(columns=[*RECORDED, *DERIVED])
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    recorded = runs.reindex(columns=[*RECORDED, *(name for name in varied_options(runs) if name not in RECORDED)])
    numbers = runs.reindex(columns=list(_NUMBERS)).astype(float).rename(columns=_NUMBERS)

    def read(path: str, recorded_loops: float) -> Samples | None:
        try:
            return read_samples(Path(path), ttft=ttft, tpot=tpot, e2e=e2e, loops=math.isnan(recorded_loops))
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: its samples can't be read (%s)", path, " ".join(str(error).split()))

    with ThreadPoolExecutor() as threads:
        samples = list(threads.map(read, recorded["path"], numbers["loop_rate"]))
    graded = {i: run for i, run in enumerate(samples) if run is not None and run.problems}

    steady = (runs.reindex(columns=["scenario.arrival"]).iloc[:, 0] == "steady").tolist()
    rows: list[dict[str, Any]] = [
        {"budget": budget, "device": device} for budget, device in zip(held_budgets(runs), devices(runs), strict=True)
    ]
    for i, (row, run) in enumerate(zip(rows, numbers.itertuples(index=False), strict=True)):
        row["cap_hit_share"] = _ratio(0 if math.isnan(run.cut) else run.cut, run.samples - run.errors)
        row["loop_rate"] = samples[i].loop_rate if samples[i] and math.isnan(run.loop_rate) else run.loop_rate
        if samples[i] and not steady[i]:
            row["slo_share"] = _ratio(samples[i].kept, samples[i].requests)
            row["slo_rate"] = samples[i].kept / run.seconds
        if i in graded:
            right = graded[i].sums.sum()
            row["goodput"], row["slo_goodput"] = right / run.seconds, graded[i].in_time / run.seconds
            gpus = math.prod(1 if math.isnan(size) else size for size in (run.devices, run.replicas))
            row["correct_per_gpu_hour"] = 3600 * row["goodput"] / gpus
    for row, path, figure in zip(rows, recorded["path"], numbers["divergence"], strict=True):
        if not math.isnan(figure):
            row |= _fidelity(path, options)
    for i, interval in _accuracies(graded, options):
        rows[i] |= {"problems": interval.clusters, "graded": interval.samples, "accuracy": interval.value}
        rows[i] |= {"accuracy.low": interval.low, "accuracy.high": interval.high}
    names, lengths = recorded["run"].tolist(), numbers["length"].tolist()
    controls = {"full": full_kv(runs), "random": random_with_prompt(runs), "bytes": random_of_as_many_bytes(runs)}
    for name, baselines in controls.items():
        pairs = {i: j for i, j in enumerate(baselines) if j is not None}
        for i, j in pairs.items():
            rows[i][f"{name}.run"] = names[j]
            if name == "full":
                rows[i]["output_length.inflation"] = _ratio(lengths[i], lengths[j])
        for i, difference in _differences(graded, pairs, options):
            warning = power_warning(difference, margin, confidence=confidence)
            found = (difference.value, difference.low, difference.high, non_inferiority(difference, margin), warning)
            rows[i] |= {f"{name}.{column}": value for column, value in zip(AGAINST[1:], found, strict=True)}
    derived = pd.DataFrame(rows, index=runs.index, columns=list(DERIVED))
    return recorded.join(derived.astype({name: object if name.endswith(_TEXTS) else float for name in DERIVED}))


_NUMBERS = {
    "loop_rate": "loop_rate",
    "finish_reasons.length": "cut",
    "samples": "samples",
    "errors": "errors",
    "seconds": "seconds",
    "engine.tensor_parallel_size": "devices",
    "engine.data_parallel_size": "replicas",
    "output_length.mean": "length",
    "fidelity.divergence": "divergence",
}
"""Columns of `load_runs()` that are computed with, and what they are called here."""


def _accuracies(graded: Mapping[int, Samples], options: Mapping[str, Any]) -> Iterator[tuple[int, Interval]]:
    for chosen in _batches(graded):
        sums, sizes = (np.stack([getattr(graded[i], name) for i in chosen]) for name in ("sums", "sizes"))
        yield from zip(chosen, mean_intervals(sums, sizes, **options), strict=True)


def _differences(
    graded: Mapping[int, Samples], pairs: Mapping[int, int], options: Mapping[str, Any]
) -> Iterator[tuple[int, Interval]]:
    """The difference of each run and its baseline, where both are graded on the same problems."""
    comparable = {}
    for i, j in pairs.items():
        if i in graded and j in graded:
            if graded[i].problems == graded[j].problems:
                comparable[i] = graded[i]
            else:
                logger.warning("run %d and its baseline %d are graded on different problems: not compared", i, j)
    for chosen in _batches(comparable):
        differences = np.stack([graded[i].means - graded[pairs[i]].means for i in chosen])
        samples = np.array([graded[i].sizes.sum() + graded[pairs[i]].sizes.sum() for i in chosen])
        yield from zip(chosen, difference_intervals(differences, samples, **options), strict=True)


def _batches(runs: Mapping[int, Samples]) -> Iterator[list[int]]:
    """Runs with equally many problems, some at a time."""
    alike = defaultdict(list)
    for i, run in runs.items():
        alike[len(run.problems)].append(i)
    for chosen in alike.values():
        yield from (chosen[begin : begin + _BATCH] for begin in range(0, len(chosen), _BATCH))


def _fidelity(path: str, options: Mapping[str, Any]) -> dict[str, float]:
    try:
        return fidelity.intervals(Path(path), **options)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s: its samples can't be read (%s)", path, " ".join(str(error).split()))
        return {}


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole > 0 else None
