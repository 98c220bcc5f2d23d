"""How close a policy stays to full KV on the same text: what a run with `scenario=fidelity` measures.

Divergence is KL(full KV || policy) in nats a token; agreement the share of tokens of which both find the same next one
the most likely; a loss is by how many nats a token the policy finds a text less likely than full KV does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from experiments.records import REQUESTS, table_path

POSITIONS = (0, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)
"""Where the bins of output positions begin."""

FIGURES = ("divergence", "agreement", "loss", "worked_divergence", "worked_loss")
"""Each is a mean over tokens."""

COLUMNS = (
    *("token_divergences", "token_agrees", "logprob", "full_logprob"),
    *("worked_tokens", "worked_divergence", "worked_logprob", "worked_full_logprob"),
)
"""Of `requests.parquet`."""


def sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each figure that there is the sum over the tokens of each text, and how many they are, [problems] each.

    Args:
        rows: of `requests.parquet`; those without fidelity are left out.
    """
    own = [row for row in rows if row.get("token_divergences") is not None]
    worked = [row for row in rows if row.get("worked_tokens")]
    found = {}
    if own:
        sizes = np.array([len(row["token_divergences"]) for row in own])
        found["divergence"] = np.array([sum(row["token_divergences"]) for row in own]), sizes
        found["agreement"] = np.array([sum(row["token_agrees"]) for row in own], np.float64), sizes
        found["loss"] = np.array([row["full_logprob"] - row["logprob"] for row in own]), sizes
    if worked:
        sizes = np.array([row["worked_tokens"] for row in worked])
        found["worked_divergence"] = np.array([row["worked_divergence"] for row in worked]), sizes
        loss = [row["worked_full_logprob"] - row["worked_logprob"] for row in worked]
        found["worked_loss"] = np.array(loss), sizes
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`FIGURES`, and divergence and agreement by position in full KV's own outputs; None where nothing was measured."""
    found = {name: float(total.sum() / sizes.sum()) for name, (total, sizes) in sums(rows).items()}
    return found | {"by_position": by_position(rows)} if found else None


def by_position(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Of each bin of output positions that holds tokens: where it begins, how many, their divergence and agreement."""
    own = [row for row in rows if row.get("token_divergences") is not None]
    divergences = np.array([x for row in own for x in row["token_divergences"]], np.float64)
    agrees = np.array([x for row in own for x in row["token_agrees"]], np.float64)
    positions = np.array([place for row in own for place in range(len(row["token_divergences"]))])
    bins = []
    for begin, end in pairwise((*POSITIONS, np.inf)):
        chosen = (positions >= begin) & (positions < end)
        if chosen.any():
            means = {"divergence": divergences[chosen].mean(), "agreement": agrees[chosen].mean()}
            bins.append({"from": begin, "tokens": int(chosen.sum())} | {k: float(v) for k, v in means.items()})
    return bins


def intervals(folder: Path, *, confidence: float, resamples: int, seed: int) -> dict[str, float]:
    """Each figure of a run as NAME, NAME.low and NAME.high: percentiles of the bootstrap that resamples problems.

    A run of a single problem has no bounds; one without fidelity has nothing.

    Raises:
        OSError, ValueError: the record can't be read.
    """
    from experiments.analysis.bootstrap import percentiles  # a run should not wait for scipy

    file = pq.ParquetFile(table_path(folder, REQUESTS))
    if not set(COLUMNS) <= set(file.schema_arrow.names):
        return {}
    found: dict[str, float] = {}
    for name, (total, sizes) in sums(file.read(columns=list(COLUMNS), use_threads=False).to_pylist()).items():
        found[name] = float(total.sum() / sizes.sum())
        if len(total) > 1:
            low, high = percentiles(total[None], sizes[None].astype(np.float64), confidence, resamples, seed)
            found |= {f"{name}.low": float(low[0]), f"{name}.high": float(high[0])}
    return found
