"""Runs as they went: throughput, concurrency and blocks over time, and how long requests took."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from experiments.plots.style import by_workload, label, line_of, one_legend, panels, require
from experiments.records import STEPS, load_requests, load_steps

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure

SLICES = 120
"""Points of a line over time."""


def throughput_over_time(runs: pd.DataFrame) -> Figure:
    """Decoded tokens a second over the seconds of each run."""

    def rate(steps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        edges = np.linspace(0, max(steps["time"].max(), 1e-9), min(SLICES, max(2, len(steps) // 4)) + 1)
        tokens, _ = np.histogram(steps["time"], edges, weights=steps["num_decode"] + steps["num_prefill"])
        return (edges[:-1] + edges[1:]) / 2, tokens / np.diff(edges)

    return _over_time(runs, rate, "decoded tokens a second")


def concurrency_over_time(runs: pd.DataFrame) -> Figure:
    """Requests that run, over the seconds of each run."""
    return _over_time(runs, lambda steps: _thinned(steps, steps["num_running"]), "running requests")


def blocks_over_time(runs: pd.DataFrame) -> Figure:
    """Share of the pool's blocks in use, over the seconds of each run."""

    def share(steps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        return _thinned(steps, 100 * steps["blocks_used"] / steps["blocks_total"].clip(lower=1))

    return _over_time(runs, share, "blocks in use (%)")


def latency_cdfs(runs: pd.DataFrame) -> Figure:
    """Shares of the samples that had their first token, their pace and their end within a time."""
    require(len(runs), "run")
    kinds = (
        ("ttft", "time to first token (s)", 1),
        ("tpot", "time per output token (ms)", 1000),
        ("e2e", "end to end (s)", 1),
    )
    figure, axes = panels([title for _, title, _ in kinds], (3.7, 3.2), columns=3)
    for _, run in runs.iterrows():
        requests, name = load_requests(run), _name(run)
        for axis, (column, _, scale) in zip(axes, kinds, strict=True):
            values = np.sort(requests[column].dropna().to_numpy(float)) * scale
            if len(values):
                axis.step(
                    values,
                    100 * np.arange(1, len(values) + 1) / len(values),
                    where="post",
                    label=name,
                    **line_of(run, runs),
                )
    for axis in axes:
        axis.set_ylim(0, 102)
        axis.set_ylabel("samples (%)", fontsize=9)
    one_legend(figure, axes)
    return figure


def _over_time(runs: pd.DataFrame, values: Callable, what: str) -> Figure:
    parts = []
    for title, part in by_workload(runs) if len(runs) else ():
        kept = part[[(_folder(run) / STEPS).exists() for _, run in part.iterrows()]]
        if len(kept):
            parts.append((title, kept))
    require(parts, "steps (an archived copy may have left them out)")
    figure, axes = panels([title for title, _ in parts], (5.4, 3.2))
    for axis, (_, part) in zip(axes, parts, strict=True):
        for _, run in part.iterrows():
            times, line = values(load_steps(run))
            axis.plot(times, line, label=_name(run), **line_of(run, part))
        axis.set_xlabel("seconds", fontsize=9)
        axis.set_ylabel(what, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    one_legend(figure, axes)
    return figure


def _thinned(steps: pd.DataFrame, values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 4 * SLICES)).astype(int))
    return steps["time"].to_numpy(float)[chosen], values.to_numpy(float)[chosen]


def _folder(run: pd.Series) -> Path:
    from pathlib import Path

    return Path(run["path"])


def _name(run: pd.Series) -> str:
    """The label, and the budget where there is one."""
    budget = run["policy.budget_tokens"]
    name = label(run)
    return name if name == "full KV" or budget is None or budget != budget else f"{name}, {budget:.0f}"
