"""Intervals for pass@1 and for its differences, and the verdicts that they allow.

Answers to one problem resemble each other, so problems are the units that are drawn: every interval here comes from
resampling problems, each with all of its samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import ndtri

from experiments.analysis.bootstrap import check_share, percentiles, quantile, tail_of, wilson

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE, RESAMPLES, SEED = 0.95, 10_000, 0
FEW_ANSWERS = 20
"""Right or wrong answers, in units of the effective sample size, below which the bootstrap of a mean undercovers."""
FEW_DIFFERENCES = 10
"""Problems with different scores in two runs, below which the bootstrap of a difference undercovers."""

Verdict = Literal["non-inferior", "inferior", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        value, low, high: shares in [0, 1], or differences of shares in [-1, 1].
        clusters: problems.
        samples: graded answers; of both runs together in a difference.
        standard_error: of `value`, problems as the units.
    """

    value: float
    low: float
    high: float
    clusters: int
    samples: int
    standard_error: float = math.nan


def clustered_mean(
    values: Sequence[float | None],
    clusters: Sequence[Hashable],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """pass@1: the mean grade over samples, with the interval of `mean_intervals`.

    Args:
        values: a grade in [0, 1] for each sample. None and NaN are samples that were not graded: they are dropped.
            Refused samples are graded 0 in the records, and count.
        clusters: the problem of each sample.

    Raises:
        ValueError: the lengths differ, a grade is outside [0, 1], or no sample is graded.
    """
    import pandas as pd

    if len(values) != len(clusters):
        raise ValueError(f"clusters: {len(clusters)} for {len(values)} values; give one for each")
    grades = np.array(values, dtype=np.float64)  # None becomes NaN
    graded = ~np.isnan(grades)
    if not graded.any():
        raise ValueError("values: no sample is graded; a mean needs at least one")
    if (grades < 0).any() or (grades > 1).any():
        raise ValueError("values: grades must be in [0, 1]")
    codes, _ = pd.factorize(np.fromiter(clusters, object, len(clusters))[graded])
    sums, sizes = np.bincount(codes, grades[graded]), np.bincount(codes)
    return mean_intervals(sums[None], sizes[None], confidence, resamples, seed)[0]


def mean_intervals(
    sums: np.ndarray,
    sizes: np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Interval]:
    """The mean over samples and its interval, for many runs that have equally many problems.

    Percentiles of the bootstrap that resamples problems, taken at the levels that give a mean of few problems its width
    back (Student's t and n - 1: the expanded percentile interval of Hesterberg 2015, The American Statistician 69).

    Where right or wrong answers are rare (below `FEW_ANSWERS`, or none at all) that undercovers, down to a width of 0.
    There it is Wilson's interval with Student's t on the effective sample size p (1 - p) / variance, the variance
    being that between problems (Dean and Pagano 2015, J. Survey Statistics and Methodology 3). That size is kept
    between the one of samples that all agree within a problem and the one of independent samples; where all grades are
    equal it is the former. A handful of problems with many samples each and a mean near 0 or 1 can't tell how much
    problems differ: 30 problems x 32 samples at 0.9 cover about 92 %.

    Args:
        sums: of the grades of each problem, each in [0, 1], [runs, problems].
        sizes: samples of each problem, at least 1, [runs, problems].

    Raises:
        ValueError: an argument is out of range.
    """
    sums, sizes = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    problems, samples = sums.shape[1], sizes.sum(1)
    value = sums.sum(1) / samples
    residuals = sums - value[:, None] * sizes
    variance = (residuals**2).sum(1) * problems / max(problems - 1, 1) / samples**2

    varies = variance > 1e-24  # not by rounding alone
    fewest = samples**2 / (sizes**2).sum(1)
    effective = np.divide(value * (1 - value), variance, out=fewest.copy(), where=varies).clip(fewest, samples)
    low, high = wilson(value, effective, quantile(problems, confidence))
    enough = np.flatnonzero(varies & (effective * np.minimum(value, 1 - value) >= FEW_ANSWERS))
    low[enough], high[enough] = percentiles(sums[enough], sizes[enough], confidence, resamples, seed)
    return _intervals(value, low, high, problems, samples, np.sqrt(variance))


def paired_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """pass@1 of run `a` less that of run `b`, with the interval of `difference_intervals`.

    Args:
        a, b: rows of `requests.parquet`, of which `prompt_id` and `grade` are read. Samples are averaged within a
            problem, so that every problem weighs the same; samples that were not graded are dropped.

    Raises:
        ValueError: the runs do not have the same graded problems.
    """
    means = [run.dropna(subset="grade").groupby("prompt_id")["grade"].agg(["mean", "size"]) for run in (a, b)]
    only_a, only_b = means[0].index.difference(means[1].index), means[1].index.difference(means[0].index)
    if len(only_a) or len(only_b):
        raise ValueError(
            f"a, b: the problems differ: {len(only_a)} only in a, {len(only_b)} only in b; "
            "compare runs of the same data and limit"
        )
    if means[0].empty:
        raise ValueError("a, b: no sample is graded; a difference needs at least one problem")
    differences = (means[0]["mean"] - means[1]["mean"]).to_numpy()
    samples = int(means[0]["size"].sum() + means[1]["size"].sum())
    return difference_intervals(differences[None], np.array([samples]), confidence, resamples, seed)[0]


def difference_intervals(
    differences: np.ndarray,
    samples: np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Interval]:
    """The mean difference over problems and its interval, for many pairs of runs on equally many problems.

    The bootstrap of `mean_intervals` over the problems' differences. Where the scores of fewer than `FEW_DIFFERENCES`
    problems differ it undercovers, down to a width of 0. There it is a t interval after half a problem is added to
    each of the four outcomes (both right, both wrong, only one right; Agresti and Min 2005, Statistics in
    Medicine 24).

    Args:
        differences: mean grade of the first run less that of the second, [pairs, problems].
        samples: graded answers behind each pair, [pairs].
    """
    differences = np.asarray(differences, np.float64)
    problems = differences.shape[1]
    value, total = differences.mean(1), problems + 2
    centre = differences.sum(1) / total
    error = np.sqrt((((differences**2).sum(1) + 1) / total - centre**2) / total)
    half = quantile(problems, confidence) * error
    low, high = (centre - half).clip(-1), (centre + half).clip(max=1)
    enough = np.flatnonzero((differences != 0).sum(1) >= FEW_DIFFERENCES)
    chosen = differences[enough]
    low[enough], high[enough] = percentiles(chosen, np.ones_like(chosen), confidence, resamples, seed)
    return _intervals(value, low, high, problems, samples, error)


# What an interval allows to be said


def non_inferiority(difference: Interval, margin: float) -> Verdict:
    """Whether a run is worse than its baseline by less than a margin that was fixed before the run.

    Args:
        difference: of the run less its baseline. At 95 % confidence this is a one-sided test at 2.5 %.
        margin: the largest loss that counts as none, in (0, 1).

    Raises:
        ValueError: the margin is outside its range.
    """
    check_share("margin", margin)
    if difference.low > -margin:
        return "non-inferior"
    return "inferior" if difference.high < -margin else "inconclusive"


def power_warning(
    difference: Interval, margin: float, power: float = 0.8, confidence: float = CONFIDENCE
) -> str | None:
    """A sentence where the problems are too few to show non-inferiority at this margin, else None.

    From the observed paired variance: were the two truly equal, this many problems would show it with the wanted power
    only at a margin of (z_{1 - alpha / 2} + z_power) standard errors.

    Raises:
        ValueError: a number is outside its range, or the interval has no standard error.
    """
    check_share("margin", margin)
    check_share("power", power)
    if not difference.standard_error > 0:
        raise ValueError("difference: it has no standard error; take it from paired_difference")
    detectable = (ndtri(power) - ndtri(tail_of(confidence))) * difference.standard_error
    if detectable <= margin:
        return None
    needed = math.ceil(difference.clusters * (detectable / margin) ** 2)
    return (
        f"{difference.clusters:,} problems can't carry a margin of {margin:.1%}: at {power:.0%} power they detect a "
        f"difference of {detectable:.1%}; about {needed:,} problems would be needed"
    )


def _intervals(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, problems: int, samples: np.ndarray, error: np.ndarray
) -> list[Interval]:
    columns = zip(value, low, high, samples, error, strict=True)
    return [Interval(float(v), float(lo), float(hi), problems, int(n), float(e)) for v, lo, hi, n, e in columns]
