"""What eviction costs in accuracy, and what it buys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.analysis.comparison import compare
from experiments.reporting.plots.style import (
    Part,
    by_workload,
    evicts,
    in_order,
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


def accuracy_by_budget(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Accuracy against the budget with 95 % intervals over problems, a panel for each workload, full KV as a band.

    Budgets are those that held, in whole blocks. Below each stands the memory that a sample's cache held at most, where
    it was recorded: equal budgets are equal bytes only up to what a policy keeps beside the entries. A line passes
    through the mean of runs that differ by their seed alone. Many policies have a panel each, with the others in grey.

    Args:
        runs: rows of `load_runs()`.
        compared: what `compare(runs)` gave, where it is at hand.
    """
    table, names = _graded(runs, compared, budget=False)
    evicting = table[evicts(table) & table["budget"].notna()]
    require(len(evicting), "graded run under a budget")
    table = pd.concat([table[~evicts(table)], evicting])
    parts = [part for part in split(table, names) if evicts(part.runs).any()]
    figure, axes = panels([part.title for part in parts])
    for axis, part in zip(axes, parts, strict=True):
        beside = _beside(table, part)
        budgets = sorted({*part.runs[evicts(part.runs)]["budget"], *beside["budget"]})
        for _, line in _groups(beside, names):
            middle = line.groupby("budget")["accuracy"].mean()
            axis.plot(np.searchsorted(budgets, middle.index), 100 * middle, color="#CCCCCC", linewidth=0.8, zorder=1)
        full = part.runs[~evicts(part.runs)]
        shown = full[["accuracy.low", "accuracy", "accuracy.high"]].to_numpy(float)
        for name, (low, value, high) in zip(part.names[full.index], shown, strict=True):
            axis.axhline(100 * value, color="black", linewidth=1.2, label=name)
            axis.axhspan(100 * low, 100 * high, color="black", alpha=0.12, linewidth=0)
        groups = _groups(part.runs[evicts(part.runs)], part.names)
        for number, (name, line) in enumerate(groups):
            shift = 0.08 * (number - (len(groups) - 1) / 2)  # so that intervals do not hide each other
            style = look(label(line.iloc[0]))
            middle = line.groupby("budget")["accuracy"].mean()
            places = np.searchsorted(budgets, middle.index) + shift
            axis.plot(places, 100 * middle, label=name, linewidth=1.4, markersize=5, **style)
            _intervals(axis, np.searchsorted(budgets, line["budget"]) + shift, line, style)
        bytes_held = [_mebibytes(part.runs[evicts(part.runs)], budget) for budget in budgets]
        axis.set_xticks(range(len(budgets)), [f"{b:,.0f}\n{held}".rstrip() for b, held in zip(budgets, bytes_held)])
        axis.set_xlim(-0.5, len(budgets) - 0.5)
        axis.set_ylim(-3, 103)
        unit = "entries; MiB a sample" if any(bytes_held) else "entries a layer and head"
        axis.set_xlabel(f"KV budget ({unit})", fontsize=9)
        axis.set_ylabel("accuracy (%)", fontsize=9)
    one_legend(figure, axes, neutral=any(part.policy for part in parts))
    return figure


def _mebibytes(runs: pd.DataFrame, budget: float) -> str:
    """What a sample's cache held at most, the mean over samples: the least and the most of a budget's runs; or ""."""
    held = runs[runs["budget"] == budget].reindex(columns=["kv_bytes.mean"]).iloc[:, 0].astype(float)
    least, most = (f"{value / 2**20:.2g}" for value in (held.min(), held.max()))
    if held.isna().all():
        return ""
    return least if least == most else f"{least}–{most}"


def accuracy_by_policy(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Accuracy of every policy with its 95 % interval: a row a policy, a panel for each workload and budget."""
    table, names = _graded(runs, compared, budget=False)
    evicting = table[evicts(table) & table["budget"].notna()]
    require(len(evicting), "graded run under a budget")
    labels = evicting.apply(label, axis=1)
    policies = pd.Series(  # with the options that tell them apart, without the protection
        [name.partition(" + ")[0] + full.removeprefix(name) for name, full in zip(labels, names[evicting.index])],
        index=evicting.index,
    )
    parts = []
    for title, part in by_workload(table):
        for budget, same in part[evicts(part)].groupby("budget"):
            parts.append((f"{title}, budget {budget:,.0f}", same, part[~evicts(part)]))
    rows = in_order(policies)
    figure, axes = panels([title for title, _, _ in parts], (4.6, 1.1 + 0.26 * len(rows)), columns=2)
    for axis, (_, same, full) in zip(axes, parts, strict=True):
        for low, value, high in full[["accuracy.low", "accuracy", "accuracy.high"]].to_numpy(float):
            axis.axvline(100 * value, color="black", linewidth=1.2, label="full KV")
            axis.axvspan(100 * low, 100 * high, color="black", alpha=0.12, linewidth=0)
        protections = same.apply(label, axis=1).str.partition(" + ")[2]
        for policy, mine in same.groupby(policies[same.index]):
            count = len(mine)
            for number, (index, run) in enumerate(mine.sort_values("policy.protection").iterrows()):
                place = rows.index(policy) + (number - (count - 1) / 2) * min(0.3, 0.7 / count)
                style = look(label(run)) | {"marker": "o", "linestyle": "none"}
                name = protections[index] or "no protection"
                span = _spans(mine.loc[[index]])
                axis.errorbar([100 * run["accuracy"]], [place], xerr=span, label=name, capsize=2, markersize=5, **style)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(-3, 103)
        axis.set_xlabel("accuracy (%)", fontsize=9)
    one_legend(figure, axes, neutral=True)
    return figure


def accuracy_by_throughput(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Accuracy against output tokens a second; a line joins the runs of a policy that no other of it beats in both.

    Many policies have a panel each, with the others in grey.
    """
    table, names = _graded(runs, compared, budget=False)
    parts = split(table, names)
    parts = [part for part in parts if len(part.runs) > 1] or parts  # a single run has nothing beside it
    figure, axes = panels([part.title for part in parts])
    for axis, part in zip(axes, parts, strict=True):
        beside = _beside(table, part)
        axis.plot(beside["output_tokens_per_second"], 100 * beside["accuracy"], ".", color="#CCCCCC", zorder=1)
        for name, line in _groups(part.runs, part.names):
            style = look(label(line.iloc[0]))
            style["marker"] = "*" if name == "full KV" else style["marker"]
            rate, right = line["output_tokens_per_second"].to_numpy(float), line["accuracy"].to_numpy(float)
            axis.plot(rate, 100 * right, label=name, markersize=5, **(style | {"linestyle": "none"}))
            _intervals(axis, rate, line, style)
            front = pareto_front(rate, right)
            if len(front) > 1:
                axis.plot(
                    rate[front], 100 * right[front], color=style["color"], linestyle=style["linestyle"], linewidth=1.2
                )
        axis.set_ylim(-3, 103)
        axis.set_xlim(left=0)
        axis.set_xlabel("output tokens a second", fontsize=9)
        axis.set_ylabel("accuracy (%)", fontsize=9)
    for workload in {part.workload for part in parts}:
        same_limits(axis for part, axis in zip(parts, axes, strict=True) if part.workload == workload)
    one_legend(figure, axes, neutral=any(part.policy for part in parts))
    return figure


def pareto_front(rate: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Indices of the points that no other passes in both, by rising rate."""
    order = np.lexsort((-accuracy, -rate))
    best, front = -np.inf, []
    for i in order:
        if accuracy[i] > best:
            best = accuracy[i]
            front.append(i)
    return np.array(front[::-1], dtype=int)


def _graded(runs: pd.DataFrame, compared: pd.DataFrame | None, budget: bool) -> tuple[pd.DataFrame, pd.Series]:
    """The rows of `compare()` that have an accuracy, and what to call each."""
    require(len(runs), "run")
    table = compare(runs) if compared is None else compared
    table = table[table["accuracy"].notna()]
    require(len(table), "graded run")
    return table, run_names(runs, budget).loc[table.index]


def _groups(part: pd.DataFrame, names: pd.Series) -> list[tuple[str, pd.DataFrame]]:
    groups = [(str(name), line) for name, line in part.groupby(names.loc[part.index])]
    return sorted(groups, key=lambda group: (rank(label(group[1].iloc[0])), group[0]))


def _beside(table: pd.DataFrame, part: Part) -> pd.DataFrame:
    """The evicting runs of the same workload that have panels of their own."""
    if part.policy is None:
        return table.iloc[:0]
    same = part.runs.iloc[0][["model.name", "workload.name"]]
    mine = (table[["model.name", "workload.name"]] == same).all(axis=1)
    return table[mine & evicts(table)].drop(part.runs.index, errors="ignore")


def _intervals(axis: Axes, places: np.ndarray, line: pd.DataFrame, style: dict[str, object]) -> None:
    axis.errorbar(
        places, 100 * line["accuracy"], yerr=_spans(line), fmt="none", ecolor=style["color"], elinewidth=1.1, capsize=2
    )


def _spans(line: pd.DataFrame) -> np.ndarray:
    below, above = line["accuracy"] - line["accuracy.low"], line["accuracy.high"] - line["accuracy"]
    return 100 * np.clip(np.array([below, above], dtype=float), 0, None)
