"""Which policy wins where, of those of one budget: by accuracy, or by how close they stay to full KV."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from experiments.analysis.baselines import (
    fields,
    full_kv,
    random_alike,
    random_alike_of_as_many_bytes,
    same_with_equal_budgets,
)
from experiments.analysis.bootstrap import percentiles
from experiments.analysis.comparison import compare
from experiments.analysis.samples import read_samples
from experiments.analysis.statistics import CONFIDENCE, RESAMPLES, SEED, difference_intervals
from experiments.config.options import in_order
from experiments.records import REQUESTS, table_path

logger = logging.getLogger(__name__)

ACCURACY, DIVERGENCE = "accuracy", "divergence"
RIVALS = ("random", "bytes", "uniform", "best")
COLUMNS = (
    *("field", "figure", "place", "value", "value.low", "value.high", "bytes_of_full"),
    *(f"{rival}.{name}" for rival in RIVALS for name in ("run", "difference", "low", "high")),
)


@dataclass(frozen=True)
class Scores:
    """What a figure is the mean of.

    Attributes:
        texts: ids of problems, or of texts that were fed, [N].
        sums, sizes: float64 [N]: grades and ones in accuracy, divergences and tokens in divergence.
        samples: graded answers, or texts.
    """

    texts: tuple[Any, ...]
    sums: np.ndarray
    sizes: np.ndarray
    samples: int


def ranking(
    runs: pd.DataFrame,
    compared: pd.DataFrame | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> pd.DataFrame:
    """The evicting runs that are graded or measure fidelity, field by field, the best of each first.

    A field is what ran on the same questions and device, with the same budget in entries, interval and protection.
    Where random eviction ran alone there is none.

    Args:
        runs: rows of `load_runs()`.
        compared: what `compare(runs)` gave, where it is at hand.
        confidence, resamples, seed: of the intervals, see `experiments.analysis.statistics`.

    Returns:
        A row for each run under its label in the index of `runs`; what can't be known is null. Differences are paired
        by problem, or by text.

        field: its number.
        figure: "accuracy", or "divergence" of a run that measures fidelity, the best of which is the least.
        place: in the field, from 1.
        value, value.low, value.high: the figure and its interval.
        bytes_of_full: mean KV bytes of a request over those under full KV.
        random.run, random.difference, random.low, random.high: random eviction of the same budget that protects the
            same, and the figure less that one's.
        bytes.run, ...: the same of random eviction that protects the same and holds as many bytes, as
            `random_of_as_many_bytes` of `experiments.analysis.baselines` says.
        uniform.run, ...: of the same policy with equal budgets, where they are unequal.
        best.run, ...: of the best of the field, for all others.

    Raises:
        ValueError: an option of the intervals is outside its range.
    """
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    if runs.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    compared = compare(runs, **options) if compared is None else compared
    held, full = compared["kv_bytes.mean"].astype(float).to_numpy(), full_kv(runs)
    rivals = {
        "random": random_alike(runs),
        "bytes": random_alike_of_as_many_bytes(runs),
        "uniform": same_with_equal_budgets(runs),
    }
    read = cache(_read)
    rows: dict[int, dict[str, Any]] = {}
    for number, members in enumerate(_fields(runs, compared)):
        figure, best = _figure(compared.iloc[members[0]]), members[0]
        for place, i in enumerate(members, 1):
            row = {"field": number, "figure": figure, "place": place, "bytes_of_full": np.nan}
            row |= {f"value{end}": compared[f"{figure}{end}"].iloc[i] for end in ("", ".low", ".high")}
            if full[i] is not None and held[full[i]] > 0:
                row["bytes_of_full"] = held[i] / held[full[i]]
            for name, found in (rivals | {"best": {i: best if i != best else None}}).items():
                if (j := found[i]) is not None:
                    difference = _difference(figure, *runs["path"].iloc[[i, j]], read, options)
                    row[f"{name}.run"] = runs["run"].iloc[j]
                    row |= dict(zip((f"{name}.{end}" for end in ("difference", "low", "high")), difference))
            rows[i] = row
    return pd.DataFrame(list(rows.values()), runs.index[list(rows)], list(COLUMNS))


def _fields(runs: pd.DataFrame, compared: pd.DataFrame) -> list[list[int]]:
    """Positions of the runs of each field, the best first; fields in the order of `in_order`."""
    numbers, found = fields(runs), defaultdict(list)
    for i in in_order(runs.reset_index(drop=True)).index:
        if numbers[i] is not None and _figure(compared.iloc[i]):
            found[numbers[i]].append(i)
    is_random = runs["policy.name"].isin(("random", "random_attention")).tolist()
    contests = [members for members in found.values() if not all(is_random[i] for i in members)]
    order = sorted(contests, key=lambda members: _place(runs.iloc[members[0]], compared.iloc[members[0]]))
    return [sorted(members, key=lambda i: _worth(compared.iloc[i])) for members in order]


def _place(run: pd.Series, compared: pd.Series) -> tuple[Any, ...]:
    what = (str(run["workload.name"]), str(run["model.name"]), _figure(compared))
    return (*what, float(compared["budget"]), str(run["policy.protection"]))


def _figure(compared: pd.Series) -> str | None:
    return next((figure for figure in (DIVERGENCE, ACCURACY) if pd.notna(compared[figure])), None)


def _worth(compared: pd.Series) -> float:
    """The less, the better."""
    return compared[DIVERGENCE] if _figure(compared) == DIVERGENCE else -compared[ACCURACY]


def _difference(
    figure: str, mine: str, other: str, read: Callable[[str, str], Scores], options: dict[str, Any]
) -> tuple[float, float, float]:
    """The figure of one run less that of another, and its bounds; NaN where they are not of the same texts."""
    unknown = (np.nan, np.nan, np.nan)
    try:
        a, b = read(mine, figure), read(other, figure)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s, %s: samples can't be read (%s)", mine, other, " ".join(str(error).split()))
        return unknown
    if a.texts != b.texts or (a.sizes != b.sizes).any():
        logger.warning("%s, %s: not of the same texts: not compared", mine, other)
        return unknown
    difference = a.sums - b.sums
    if figure == ACCURACY:
        found = difference_intervals(difference[None], np.array([a.samples + b.samples]), **options)[0]
        return found.value, found.low, found.high
    value = float(difference.sum() / a.sizes.sum())
    if len(difference) < 2:
        return value, np.nan, np.nan
    low, high = percentiles(difference[None], a.sizes[None], **options)
    return value, float(low[0]), float(high[0])


def _read(path: str, figure: str) -> Scores:
    if figure == ACCURACY:
        samples = read_samples(Path(path))
        return Scores(samples.problems, samples.means, np.ones(len(samples.sums)), int(samples.sizes.sum()))
    file = pq.ParquetFile(table_path(Path(path), REQUESTS))
    rows = file.read(columns=["prompt_id", "sample_index", "token_divergences"], use_threads=False).to_pylist()
    fed = sorted(
        ((row["prompt_id"], row["sample_index"]), row["token_divergences"])
        for row in rows
        if row["token_divergences"] is not None
    )
    sums, sizes = (np.array([float(of(tokens)) for _, tokens in fed]) for of in (sum, len))
    return Scores(tuple(text for text, _ in fed), sums, sizes, len(fed))
