"""How close a policy stays to full KV on the same text: what a run with `scenario=fidelity` measures.

Divergence is KL(full KV || policy) in nats a token; agreement the share of tokens of which both find the same next one
the most likely; a loss is by how many nats a token the policy finds a text less likely than full KV does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from experiments.config.options import BUDGET, held_budgets, held_intervals, label, readable_options
from experiments.records import REQUESTS, load_requests, table_path

if TYPE_CHECKING:
    import pandas as pd

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
    """`FIGURES`, and divergence and agreement by position in full KV's own outputs; None where nothing was fed.

    `unmeasured` and `worked_unmeasured` count the texts that could not be compared.
    """
    found: dict[str, Any] = {name: float(total.sum() / sizes.sum()) for name, (total, sizes) in sums(rows).items()}
    left = {name: sum(row.get(name) is not None for row in rows) for name in ("unmeasured", "worked_unmeasured")}
    return found | {"by_position": by_position(rows)} | left if found or any(left.values()) else None


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


# How well it predicts accuracy

PREDICTORS = ("divergence", "agreement")
FEWEST_ARMS = 4

NO_MATTER = (
    *("policy.bytes_as", "policy.scheduling", "policy.async_compression", "policy.interval"),
    *("workload.path", "workload.seed", "workload.samples", "workload.max_tokens", "workload.id"),
)
"""Options that may differ between the runs of an arm: what asks for a budget, when things happen, which problems."""


def predicts(
    fidelity_runs: pd.DataFrame,
    accuracy_runs: pd.DataFrame,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well fidelity ranks policies as accuracy does: Spearman's correlation over `shared_arms`.

    Args:
        fidelity_runs, accuracy_runs: rows of `load_runs()`.
        confidence, resamples, seed: of the percentile bootstrap that resamples arms.

    Returns:
        A row for each model, workload and figure of `PREDICTORS`: model.name, workload.name, figure, arms, correlation,
        low, high. Divergence that predicts has a correlation near -1, agreement one near 1. A workload with fewer than
        `FEWEST_ARMS` arms has no row.
    """
    import pandas as pd

    rows = []
    for (model, workload), arms in shared_arms(fidelity_runs, accuracy_runs).groupby(["model.name", "workload.name"]):
        if len(arms) < FEWEST_ARMS:
            continue
        drawn = np.random.default_rng(seed).integers(len(arms), size=(resamples, len(arms)))
        right = arms["accuracy"].to_numpy(float)
        for figure in PREDICTORS:
            values = arms[figure].to_numpy(float)
            found = _rank_correlation(values[drawn], right[drawn])
            bounds = np.nanquantile(found, ((1 - confidence) / 2, (1 + confidence) / 2))
            whole = _rank_correlation(values[None], right[None])[0]
            rows.append((model, workload, figure, len(arms), float(whole), *map(float, bounds)))
    return pd.DataFrame(rows, columns=["model.name", "workload.name", "figure", "arms", "correlation", "low", "high"])


def shared_arms(fidelity_runs: pd.DataFrame, accuracy_runs: pd.DataFrame) -> pd.DataFrame:
    """The evicting arms that both have: same model, workload, policy with its options, protection and held budget.

    Full KV is no arm: it diverges from itself by rounding alone. Runs that repeat an arm are pooled.

    Returns:
        A row for each arm: model.name, workload.name, policy.name, policy.protection, budget, `PREDICTORS`, and
        accuracy, accuracy.low and accuracy.high over all samples of the arm, with the interval of `clustered_mean`.

    Raises:
        OSError: a record can't be read.
    """
    import pandas as pd

    from experiments.analysis.statistics import clustered_mean

    measured = _having(fidelity_runs, "fidelity.divergence")
    graded = _having(accuracy_runs, "accuracy")
    names = ["model.name", "workload.name", "policy.name", "policy.protection"]
    columns = [*names, "budget", *PREDICTORS, "accuracy", "accuracy.low", "accuracy.high"]
    if measured.empty or graded.empty:
        return pd.DataFrame(columns=columns)
    keys = _arms(pd.concat([measured, graded], ignore_index=True)).to_numpy()
    own, others = keys[: len(measured)], keys[len(measured) :]
    rows = []
    for arm in dict.fromkeys(own):
        runs, its = measured[own == arm], graded[others == arm]
        if its.empty:
            continue
        samples = pd.concat([load_requests(path)[["prompt_id", "grade"]] for path in its["path"]])
        right = clustered_mean(samples["grade"].tolist(), samples["prompt_id"].tolist())
        fidelity = [runs[f"fidelity.{figure}"].astype(float).mean() for figure in PREDICTORS]
        budget = held_budgets(runs).iloc[0]
        rows.append((*runs.iloc[0][names], budget, *fidelity, right.value, right.low, right.high))
    return pd.DataFrame(rows, columns=columns)


def _having(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """The evicting runs that have a figure."""
    return runs[runs.reindex(columns=[column]).iloc[:, 0].notna() & (runs["policy.name"] != "full")]


def _arms(runs: pd.DataFrame) -> pd.Series:
    """What tells the arm of each run from others, as one text."""
    options = [n for n in runs if n.partition(".")[0] in ("policy", "workload") and n not in NO_MATTER]
    texts = readable_options(runs, sorted({"model.name", BUDGET, *options}))
    texts = texts.assign(
        **{"policy.name": runs.apply(label, axis=1), "policy.protection": held_intervals(runs).map(str)}
    )
    return texts.astype(str).agg("|".join, axis=1)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each row: [rows, arms] twice to [rows]; NaN where a row has equal values alone."""
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=1) for values in (a, b))
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
