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


def cache_over_tokens(requests: pd.DataFrame, events: pd.DataFrame, prompt_id: str, sample_index: int = 0) -> Figure:
    """Entries that each layer and head of a sample held, and its blocks, against its length; dotted: without eviction.

    Args:
        requests, events: of `load_requests(run)` and `load_events(run)`.
        prompt_id, sample_index: which sample.
    """
    mine, happened = (
        rows[(rows["prompt_id"] == prompt_id) & (rows["sample_index"] == sample_index)] for rows in (requests, events)
    )
    happened = happened[happened["kind"] == "compress"].sort_values("round")
    require(len(mine), f"sample {sample_index} of {prompt_id}")
    require(len(happened), f"compression of {prompt_id}")
    begin = int(mine["prompt_tokens"].iloc[0])
    lengths = np.arange(begin, begin + int(mine["output_tokens"].iloc[0]) + 1)
    latest = np.searchsorted(happened["num_tokens"], lengths, side="right") - 1
    since, after = happened["num_tokens"].to_numpy(), happened["entries_after"].to_numpy()
    entries = np.where(latest < 0, lengths - 1, after[latest] + lengths - since[latest])  # the last token has none yet
    block = round((happened["entries_before"] / happened["blocks_before"]).max())
    figure, axes = panels(["entries a layer and head", "blocks"], (4.6, 2.9))
    for axis, size in zip(axes, (1, block), strict=True):
        axis.step(lengths, np.ceil((lengths - 1) / size), where="post", color="black", linestyle=":", linewidth=1.2)
        axis.step(lengths, np.ceil(entries / size), where="post", color="#0072B2", linewidth=1.4)
        axis.axvline(begin, color="#7F7F7F", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens of prompt and output", fontsize=9)
    axes[0].annotate(
        "end of prompt", (begin, 0), xytext=(4, 6), textcoords="offset points", fontsize=8, color="#555555"
    )
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
