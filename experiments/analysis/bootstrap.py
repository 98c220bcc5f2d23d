"""The bootstrap that resamples clusters, and the interval where it can't be trusted."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

_BATCH = 128
"""Runs resampled at once: 5 MB of means for 10,000 resamples."""

_DRAWN = 1 << 18
"""Clusters drawn at once."""


def percentiles(
    sums: np.ndarray, sizes: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean by the expanded percentile bootstrap.

    Args:
        sums, sizes: sum of the values of each cluster and their number, [runs, clusters]; at least two clusters.

    Returns:
        The lower and the upper bounds, [runs] each. A run's depend on the runs beside it by rounding at most.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: must be at least 1")
    runs, clusters = sums.shape
    bounds = np.empty((2, runs))
    if not runs:
        return bounds[0], bounds[1]
    tail = ndtr(-quantile(clusters, confidence) * math.sqrt(clusters / (clusters - 1)))
    outside = int(tail * (resamples - 1))
    counts = _counts(clusters, resamples, seed).astype(np.float32)
    for begin in range(0, runs, _BATCH):
        part = slice(begin, begin + _BATCH)
        drawn, size = sums[part].astype(np.float32) @ counts.T, sizes[part].sum(1)
        if (sizes[part] != sizes[part, :1]).any():
            drawn *= size[:, None] / (sizes[part].astype(np.float32) @ counts.T)
        drawn.sort(axis=1)
        bounds[:, part] = drawn[:, outside] / size, drawn[:, -1 - outside] / size
    return bounds[0], bounds[1]


@lru_cache(maxsize=16)
def _counts(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn: multinomial counts, uint16 [resamples, clusters].

    Kept for the groups of a picture, which differ a little in how many problems they have.
    """
    random = np.random.default_rng(seed)
    counts = np.empty((resamples, clusters), np.uint16)
    rows = max(1, _DRAWN // clusters)
    for begin in range(0, resamples, rows):
        part = counts[begin : begin + rows]
        drawn = random.integers(clusters, size=part.shape) + clusters * np.arange(len(part))[:, None]
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    return counts


def wilson(value: np.ndarray, size: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's bounds of a share `value` of `size` independent values, [runs] each; `value` itself is never outside."""
    shrink = 1 + z * z / size
    centre = (value + z * z / (2 * size)) / shrink
    half = z * np.sqrt(value * (1 - value) / size + z * z / (4 * size * size)) / shrink
    return np.minimum(centre - half, value).clip(0), np.maximum(centre + half, value).clip(max=1)


def quantile(clusters: int, confidence: float) -> float:
    """Of Student's t; of the normal distribution for a single cluster, which has no variance to estimate."""
    tail = tail_of(confidence)
    return float(-(stdtrit(clusters - 1, tail) if clusters > 1 else ndtri(tail)))


def tail_of(confidence: float) -> float:
    check_share("confidence", confidence)
    return (1 - confidence) / 2


def check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value}: must be above 0 and below 1, such as 0.02 for two points of a hundred")
