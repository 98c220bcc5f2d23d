"""What eviction buys where memory is short: speed over full KV in the same pool, and the share of its accuracy that is
left."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from experiments.analysis.baselines import POOL, full_kv_of_same_pool
from experiments.analysis.bootstrap import check_share, percentiles
from experiments.analysis.comparison import compare
from experiments.analysis.samples import Samples, read_samples
from experiments.analysis.statistics import CONFIDENCE, FEW_DIFFERENCES, RESAMPLES, SEED, difference_intervals

logger = logging.getLogger(__name__)

KEEP = 0.95
"""The share of full KV's accuracy that the literature asks of eviction."""

Claim = Literal["holds", "fails", "open"]

COLUMNS = ("pool", "pool.full", "speed_up", "answers_speed_up", "share", "share.low", "share.high", "claim")


def frontier(
    runs: pd.DataFrame,
    compared: pd.DataFrame | None = None,
    keep: float = KEEP,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> pd.DataFrame:
    """The graded rows of `compare()` that belong to a pool in which full KV and an evicting policy ran, with `COLUMNS`.

    Runs of different pools, loads or devices are never compared.

    Args:
        runs: rows of `load_runs()`.
        compared: what `compare(runs)` gave, where it is at hand.
        keep: the share of full KV's accuracy that is claimed.
        confidence, resamples, seed: of the intervals.

    Returns:
        pool: its size as text: "2 GiB", "1,000 blocks", "90 % of the GPU".
        pool.full: the run of full KV in this pool; full KV's row names itself.
        speed_up, answers_speed_up: output tokens, and answers, a second over those of full KV. Each is of one run and
            has no interval.
        share, share.low, share.high: accuracy over that of full KV, paired by problem; see `share_kept`.
        claim: whether the run keeps `keep`: see `claim`. None for full KV itself.

    Raises:
        ValueError: `keep` or an option of the intervals is outside its range.
    """
    check_share("keep", keep)
    table = compare(runs) if compared is None else compared
    tokens, answers = runs["output_tokens_per_second"], runs["samples"] / runs["seconds"]
    rows: dict[object, dict[str, object]] = {}
    samples: dict[int, Samples] = {}
    for i, j in enumerate(full_kv_of_same_pool(runs)):
        if j is None or table["accuracy"].iloc[[i, j]].isna().any():
            continue
        try:
            mine, full = (samples.setdefault(k, read_samples(Path(runs["path"].iloc[k]))) for k in (i, j))
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: its samples can't be read (%s)", runs["path"].iloc[i], " ".join(str(error).split()))
            continue
        if mine.problems != full.problems or not full.sums.any():
            logger.warning("%s: graded on other problems than full KV, or full KV has none right", runs["path"].iloc[i])
            continue
        own = {"pool": pool_text(runs.iloc[j]), "pool.full": runs["run"].iloc[j]}
        rows[runs.index[j]] = own | dict.fromkeys(COLUMNS[2:], 1.0) | {"claim": None}
        share, low, high = share_kept(mine.means, full.means, confidence, resamples, seed)
        rows[runs.index[i]] = own | {
            "speed_up": tokens.iloc[i] / tokens.iloc[j],
            "answers_speed_up": answers.iloc[i] / answers.iloc[j],
            **{"share": share, "share.low": low, "share.high": high, "claim": claim(low, high, keep)},
        }
    order = [index for index in table.index if index in rows]
    return table.loc[order].join(pd.DataFrame([rows[index] for index in order], order, list(COLUMNS)))


def share_kept(
    means: np.ndarray,
    full: np.ndarray,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float, float]:
    """Accuracy over that of full KV, and the bounds of its interval.

    Percentiles of the bootstrap that resamples problems, each with both of its scores. Where the scores of fewer than
    `FEW_DIFFERENCES` problems differ, the interval of the paired difference over full KV's accuracy instead.

    Args:
        means, full: the mean grade of each problem, [problems] each; `full` holds at least one above 0.
    """
    differences = (means - full)[None]
    share = float(means.sum() / full.sum())
    if (differences != 0).sum() < FEW_DIFFERENCES:
        found = difference_intervals(differences, np.array([2 * full.size]), confidence, resamples, seed)[0]
        return share, max(0.0, 1 + found.low / full.mean()), 1 + found.high / full.mean()
    low, high = percentiles(means[None], full[None], confidence, resamples, seed)
    return share, float(low[0]), float(high[0])


def claim(low: float, high: float, keep: float = KEEP) -> Claim:
    """Whether the share kept is at least `keep`: "holds" or "fails" where its whole interval says so, else "open"."""
    if low >= keep:
        return "holds"
    return "fails" if high < keep else "open"


def best_speed_up(rows: pd.DataFrame) -> float | None:
    """The greatest `speed_up` of the runs whose claim holds; None where it holds for none."""
    held = rows.loc[rows["claim"] == "holds", "speed_up"]
    return float(held.max()) if len(held) else None


def pool_text(run: pd.Series) -> str:
    """The size of a run's pool, as it was asked for."""
    blocks, size, share = (run.get(name) for name in POOL)
    if pd.notna(blocks):
        return f"{blocks:,.0f} blocks"
    if pd.notna(size):
        return f"{size / 2**30:.3g} GiB"
    return "-" if pd.isna(share) else f"{100 * share:.3g} % of the GPU"
