"""Accuracy against speed, pool by pool: what eviction buys where memory is short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.analysis.baselines import POOL
from experiments.analysis.frontier import KEEP, best_speed_up, frontier
from experiments.reporting.plots.style import (
    Part,
    evicts,
    label,
    look,
    one_legend,
    panels,
    rank,
    require,
    run_names,
    same_limits,
    split,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLISHED = 2.1
"""The speed-up at 95 % of full KV's accuracy that the paper of Zipage claims."""


@dataclass(frozen=True)
class _Panel:
    title: str
    part: Part
    pool: pd.DataFrame
    """All rows of the pool, of which the part may show one policy."""


def accuracy_by_speed_up(runs: pd.DataFrame, compared: pd.DataFrame | None = None, keep: float = KEEP) -> Figure:
    """Accuracy against throughput over that of full KV in the same pool, a panel for each pool.

    A line joins the budgets of a policy, full KV is the star at 1 x. Bars are 95 % intervals over problems. The broken
    line lies at `keep` of full KV's accuracy; upright lines at 1 x, at the best speed-up of a run whose interval shows
    that it keeps as much, and at the one published. Many policies have a panel each, with the others in grey.

    Args:
        runs: rows of `load_runs()`.
        compared: what `compare(runs)` gave, where it is at hand.
    """
    require(len(runs), "run")
    table = frontier(runs, compared, keep)
    require(len(table), "graded run of full KV and of an evicting policy in one pool")
    names = run_names(runs.loc[table.index], budget=False, apart=POOL)
    shown = []
    for _, pool in sorted(table.groupby("pool.full"), key=lambda group: _place(group[1])):
        shown += [
            _Panel(f"{part.title}, {pool['pool'].iloc[0]}", part, pool) for part in split(pool, names[pool.index])
        ]
    figure, axes = panels([panel.title for panel in shown])
    for axis, panel in zip(axes, shown, strict=True):
        _draw(axis, panel, keep)
    for titles in {panel.part.workload for panel in shown}:
        same_limits((axis for axis, panel in zip(axes, shown) if panel.part.workload == titles), x=False)
    one_legend(figure, axes, neutral=any(panel.part.policy for panel in shown))
    return figure


def _draw(axis: Axes, panel: _Panel, keep: float) -> None:
    full = panel.pool[~evicts(panel.pool)].iloc[0]
    kept = keep * 100 * full["accuracy"]
    axis.axhline(kept, color="black", linewidth=1, linestyle="--", label=f"{100 * keep:g} % of full KV")
    axis.axvline(1, color="#999999", linewidth=0.8)
    axis.axvline(PUBLISHED, color="#999999", linewidth=1, linestyle=":", label=f"{PUBLISHED:g} x (published)")
    if best := best_speed_up(panel.pool):
        axis.axvline(best, color="black", linewidth=1, linestyle="-.", label=f"best that keeps {100 * keep:g} %")
        axis.annotate(
            f"{best:.2f} x", (best, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    if panel.part.policy:
        axis.plot(panel.pool["speed_up"], 100 * panel.pool["accuracy"], ".", color="#CCCCCC", zorder=1)
    runs, names = panel.part.runs, panel.part.names
    for name, line in sorted(
        runs.groupby(names[runs.index]), key=lambda group: (rank(label(group[1].iloc[0])), group[0])
    ):
        line, style = line.sort_values("budget"), look(label(line.iloc[0]))
        style["marker"] = "*" if name == "full KV" else style["marker"]
        spans = line[["accuracy.low", "accuracy.high"]].sub(line["accuracy"], axis=0).abs().to_numpy(float).T
        axis.errorbar(
            line["speed_up"], 100 * line["accuracy"], yerr=100 * spans, label=name, capsize=2, elinewidth=0.9,
            linewidth=1.2, markersize=9 if name == "full KV" else 5, **style,
        )  # fmt: skip
        for x, top, budget in line[["speed_up", "accuracy.high", "budget"]].to_numpy(float):
            if not (np.isnan(budget) or panel.part.policy):
                axis.annotate(
                    f"{budget:,.0f}", (x, 100 * top), (0, 3), textcoords="offset points", rotation=90, ha="center",
                    va="bottom", fontsize=7, bbox={"color": "white", "pad": 0.5},
                )  # fmt: skip
    axis.margins(y=0.18)
    axis.set_xlim(left=0.0 if panel.pool["speed_up"].min() < 0.8 else 0.8)
    axis.set_xlabel(f"tokens/s over full KV's {full['output_tokens_per_second']:,.0f}", fontsize=9)
    axis.set_ylabel("accuracy (%)", fontsize=9)


def _place(pool: pd.DataFrame) -> tuple[str, str, float]:
    """By workload and model, then from the least throughput of full KV."""
    full = pool[~evicts(pool)].iloc[0]
    return full["workload.name"], full["model.name"], full["output_tokens_per_second"]
