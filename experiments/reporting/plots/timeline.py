"""Runs as they went: throughput, concurrency and blocks over time, and how long requests took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.analysis.replicas import at_once
from experiments.records import STEPS, load_requests, load_steps
from experiments.reporting.plots.style import (
    Part,
    line_looks,
    one_legend,
    panels,
    require,
    run_names,
    same_limits,
    split,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLICES = 60
"""Points of a line over time."""
MARKS = 8
"""Markers on a line over time, so that lines are told apart in print without colours."""

Line = tuple[np.ndarray, np.ndarray]


def throughput_over_time(runs: pd.DataFrame) -> Figure:
    """Decoded tokens a second over the seconds of each run."""
    return _over_time(runs, [(decoding_rate, "decoded tokens a second")])


def concurrency_over_time(runs: pd.DataFrame) -> Figure:
    """Requests that run, and those that wait, over the seconds of each run."""

    def count(column: str) -> Callable[[pd.DataFrame], Line]:
        return lambda steps: _thinned(steps, _at_once(steps, column))

    return _over_time(runs, [(count("num_running"), "running requests"), (count("num_waiting"), "waiting requests")])


def blocks_over_time(runs: pd.DataFrame) -> Figure:
    """Share of the pool's blocks in use, over the seconds of each run."""

    def share(steps: pd.DataFrame) -> Line:
        pools = steps["blocks_total"].groupby(_replicas(steps)).max()
        return _thinned(steps, 100 * _at_once(steps, "blocks_used") / max(pools.sum(), 1))

    return _over_time(runs, [(share, "blocks in use (%)")])


def latency_cdfs(runs: pd.DataFrame) -> Figure:
    """Shares of the samples that had their first token, their pace and their end within a time. Of a steady state only
    short requests end, so it is left out."""
    runs = runs[runs.reindex(columns=["scenario.arrival"]).iloc[:, 0] != "steady"]
    require(len(runs), "run but steady states")
    kinds = (
        ("ttft", "time to first token (s)", 1),
        ("tpot", "time per output token (ms)", 1000),
        ("e2e", "end to end (s)", 1),
    )
    parts = split(runs, run_names(runs))
    titles = [part.title if column == "ttft" else "" for part in parts for column, _, _ in kinds]
    figure, axes = panels(titles, (3.1, 2.7), columns=3)
    drawn = False
    for i, part in enumerate(parts):
        for (_, run), name, style in zip(part.runs.iterrows(), part.names, line_looks(part.runs), strict=True):
            requests = load_requests(run)
            for axis, (column, _, scale) in zip(axes[3 * i :], kinds):
                values = np.sort(requests[column].dropna().to_numpy(float)) * scale
                if len(values):
                    drawn = True
                    shares = 100 * np.arange(1, len(values) + 1) / len(values)
                    axis.step(values, shares, where="post", label=name, markevery=_marked(len(values)), **style)
        for axis, (_, what, _) in zip(axes[3 * i :], kinds):
            axis.set_ylim(0, 104)
            axis.set_xlabel(what, fontsize=9)
        axes[3 * i].set_ylabel("samples (%)", fontsize=9)
    for kind in range(3):
        _align(parts, axes[kind::3])
    require(drawn, "sample with times")
    one_legend(figure, axes, neutral=any(part.policy for part in parts))
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


def decoding_rate(steps: pd.DataFrame) -> Line:
    """Middles of equal slices of time, and the tokens a second that were decoded in each.

    A step decodes evenly from its begin to its end, so that a slice's edge inside it is not a jump.
    """
    last = max(steps["time"].iloc[-1], 1e-9)
    edges = np.linspace(0, last, min(SLICES, max(2, len(steps) // 4)) + 1)
    tokens = sum(_decoded_until(edges, own) for _, own in steps.groupby(_replicas(steps)))
    return (edges[:-1] + edges[1:]) / 2, np.diff(tokens) / np.diff(edges)


def _decoded_until(moments: np.ndarray, steps: pd.DataFrame) -> np.ndarray:
    """Tokens that the steps of one replica had decoded at each of the moments."""
    ends = steps["time"].to_numpy(float)
    begins = np.maximum(ends - steps["step_time"].to_numpy(float), np.concatenate([[0.0], ends[:-1]]))
    decoded = np.concatenate([[0], np.cumsum(steps["num_decode"])])
    known = np.stack([begins, ends], axis=1).ravel()
    return np.interp(moments, known, np.stack([decoded[:-1], decoded[1:]], axis=1).ravel(), left=0)


def _replicas(steps: pd.DataFrame) -> np.ndarray:
    """Of each step; records from before there were several have no such column."""
    return steps["replica"].to_numpy() if "replica" in steps else np.zeros(len(steps), int)


def _at_once(steps: pd.DataFrame, column: str) -> np.ndarray:
    return at_once(_replicas(steps), steps[column].to_numpy())


def _over_time(runs: pd.DataFrame, kinds: list[tuple[Callable[[pd.DataFrame], Line], str]]) -> Figure:
    """Panels of each kind of line beside each other."""
    lines = {}
    for index, run in runs.iterrows():
        if (Path(run["path"]) / STEPS).exists() and len(steps := load_steps(run)):
            lines[index] = [values(steps) for values, _ in kinds]
    runs = runs.loc[list(lines)]
    require(len(runs), "steps (an archived copy may have left them out)")
    shown = [kind for kind in range(len(kinds)) if any(np.any(line[kind][1] > 0) for line in lines.values())]
    require(shown, f"{kinds[0][1]} above zero")
    kinds, lines = [kinds[kind] for kind in shown], {i: [line[k] for k in shown] for i, line in lines.items()}
    parts = split(runs, run_names(runs))
    titles = [part.title for part in parts for _ in kinds]
    figure, axes = panels(titles, columns=None if len(kinds) == 1 else 2 if len(parts) < 3 else 4)
    for place, axis in enumerate(axes):
        part, kind = parts[place // len(kinds)], place % len(kinds)
        looks = line_looks(part.runs)
        for number, (index, name, style) in enumerate(zip(part.runs.index, part.names, looks, strict=True)):
            times, line = lines[index][kind]
            axis.plot(times, line, label=name, markevery=_marked(len(times), number), **style)
        axis.set_xlabel("seconds", fontsize=9)
        axis.set_ylabel(kinds[kind][1], fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.yaxis.get_major_locator().set_params(integer=True)
    for kind in range(len(kinds)):
        _align(parts, axes[kind :: len(kinds)])
    one_legend(figure, axes, neutral=any(part.policy for part in parts))
    return figure


def _align(parts: list[Part], axes: list[Axes]) -> None:
    """One scale for the panels of each workload."""
    for workload in {part.workload for part in parts}:
        same_limits(axis for part, axis in zip(parts, axes, strict=True) if part.workload == workload)


def _marked(points: int, number: int = 0) -> tuple[int, int]:
    """Where a line has its markers; lines beside it have theirs elsewhere."""
    every = max(1, points // MARKS)
    return number * max(1, every // 4) % every, every


def _thinned(steps: pd.DataFrame, values: np.ndarray) -> Line:
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8 * SLICES)).astype(int))
    return steps["time"].to_numpy(float)[chosen], values.astype(float)[chosen]
