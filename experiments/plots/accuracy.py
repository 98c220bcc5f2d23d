"""What eviction costs in accuracy, and what it buys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.comparison import compare
from experiments.plots.style import by_workload, label, look, one_legend, panels, require
from experiments.records import load_requests
from experiments.statistics import clustered_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 5
"""Groups of facts by distance, of equal size."""


def accuracy_by_budget(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Accuracy against the budget with 95 % intervals over problems, a panel for each workload, full KV as a band.

    Args:
        runs: rows of `load_runs()`.
        compared: what `compare(runs)` gave, where it is at hand.
    """
    table = _graded(runs, compared)
    evicting = table[table["policy.budget_tokens"].notna()]
    require(len(evicting), "graded run under a budget")
    parts = [(title, part) for title, part in by_workload(table) if part["policy.budget_tokens"].notna().any()]
    figure, axes = panels([title for title, _ in parts])
    for axis, (_, part) in zip(axes, parts, strict=True):
        budgets = sorted(part["policy.budget_tokens"].dropna().unique())
        _full_band(axis, part)
        names = part.apply(label, axis=1)
        for i, (name, line) in enumerate(_groups(part[part["policy.budget_tokens"].notna()], names)):
            line = line.sort_values("policy.budget_tokens")
            place = np.searchsorted(budgets, line["policy.budget_tokens"].to_numpy(float))
            shift = 0.06 * ((i + 1) // 2) * (-1) ** i  # so that intervals do not hide each other
            _errorbar(axis, place + shift, line, name)
        axis.set_xticks(range(len(budgets)), [f"{int(budget):,}" for budget in budgets])
        axis.set_xlim(-0.4, len(budgets) - 0.6)
        axis.set_ylim(-3, 103)
        axis.set_xlabel("KV budget (entries a layer and head)", fontsize=9)
        axis.set_ylabel("accuracy (%)", fontsize=9)
    one_legend(figure, axes)
    return figure


def accuracy_by_throughput(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Accuracy against output tokens a second; a line joins the runs of a policy that no other of it beats in both."""
    table = _graded(runs, compared)
    parts = by_workload(table)
    parts = [(title, part) for title, part in parts if len(part) > 1] or parts  # a single run has nothing beside it
    figure, axes = panels([title for title, _ in parts])
    for axis, (_, part) in zip(axes, parts, strict=True):
        names = part.apply(label, axis=1)
        for name, line in _groups(part, names):
            style = look(name)
            style["marker"] = "*" if name == "full KV" else style["marker"]
            rate = line["output_tokens_per_second"].to_numpy(float)
            axis.errorbar(
                rate, 100 * line["accuracy"], yerr=_spans(line), label=name, capsize=2, linewidth=1, markersize=5,
                **(style | {"linestyle": "none"}),
            )  # fmt: skip
            front = pareto_front(rate, line["accuracy"].to_numpy(float))
            if len(front) > 1:
                axis.plot(
                    rate[front], 100 * line["accuracy"].to_numpy(float)[front],
                    color=style["color"], linestyle=style["linestyle"], linewidth=1,
                )  # fmt: skip
        axis.set_ylim(-3, 103)
        axis.set_xlim(left=0)
        axis.set_xlabel("output tokens a second", fontsize=9)
        axis.set_ylabel("accuracy (%)", fontsize=9)
    one_legend(figure, axes)
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


def facts_by_distance(runs: pd.DataFrame) -> Figure:
    """Share of the facts known against how far back they were stated: a panel for each workload and budget.

    Points are groups of equal size, with 95 % intervals over problems.
    """
    parts = []
    for title, part in by_workload(runs) if len(runs) else ():
        for budget, same in part.groupby("policy.budget_tokens"):
            lines = {label(run): requests for _, run in same.iterrows() if (requests := _facts(run)) is not None}
            if lines:
                parts.append((f"{title}, budget {budget:,.0f}", lines))
    require(parts, "run under a budget whose problems name facts")
    figure, axes = panels([title for title, _ in parts])
    for axis, (_, lines) in zip(axes, parts, strict=True):
        for name, requests in sorted(lines.items()):
            centres, known = known_by_distance(requests)
            spans = np.array([[k.value - k.low, k.high - k.value] for k in known]).T
            axis.errorbar(
                centres,
                [100 * k.value for k in known],
                yerr=100 * spans.clip(0),
                label=name,
                capsize=2,
                linewidth=1.4,
                markersize=4,
                **look(name),
            )
        axis.set_ylim(-3, 103)
        axis.set_xlim(left=0)
        axis.set_xlabel("distance to where it was stated last (tokens)", fontsize=9)
        axis.set_ylabel("facts known (%)", fontsize=9)
    one_legend(figure, axes)
    return figure


def _facts(run: pd.Series) -> pd.DataFrame | None:
    requests = load_requests(run)
    if "fact_distances" not in requests or requests["fact_distances"].isna().all():
        return None
    return requests.dropna(subset="fact_distances")


def known_by_distance(requests: pd.DataFrame, bins: int = BINS) -> tuple[list[float], list]:
    """Mean distances of groups of facts, and the share of each that was known as an `Interval` over problems."""
    facts = requests[["prompt_id", "fact_distances", "facts_known"]].explode(["fact_distances", "facts_known"])
    facts = facts.astype({"fact_distances": float, "facts_known": float})
    groups = pd.qcut(facts["fact_distances"].rank(method="first"), min(bins, len(facts)), labels=False)
    centres, known = [], []
    for _, group in facts.groupby(groups):
        centres.append(group["fact_distances"].mean())
        known.append(clustered_mean(group["facts_known"].tolist(), group["prompt_id"].tolist()))
    return centres, known


def length_inflation(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """How much longer each answer is than under full KV on the same problem: medians, quartiles, 5 and 95 %."""
    table = compare(runs) if compared is None else compared
    table = table[table["full.run"].notna()]
    require(len(table), "evicting run with full KV beside it")
    names, ratios = [], []
    by_run = runs.set_index("run")
    for index, row in table.iterrows():
        ours, full = (_lengths(run) for run in (runs.loc[index], by_run.loc[row["full.run"]]))
        budget = "" if pd.isna(row["policy.budget_tokens"]) else f", {row['policy.budget_tokens']:.0f}"
        names.append(f"{label(row)}{budget} · {row['workload.name']}")
        ratios.append((ours / full).dropna().to_numpy())
    order = sorted(range(len(names)), key=lambda i: (table["workload.name"].iloc[i], _by_name_and_budget(names[i])))
    figure, (axis,) = panels(["output length against full KV, problem by problem"], (7.5, 1.2 + 0.24 * len(names)))
    boxes = axis.boxplot(
        [ratios[i] for i in order], orientation="horizontal", whis=(5, 95), showfliers=False, patch_artist=True
    )
    for box, i in zip(boxes["boxes"], order):
        box.set_facecolor(look(names[i].partition(",")[0].partition(" ·")[0])["color"])
        box.set_alpha(0.6)
    for line in boxes["medians"]:
        line.set_color("black")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(1, len(order) + 1), [names[i] for i in order], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("output tokens / output tokens of full KV", fontsize=9)
    return figure


def _by_name_and_budget(name: str) -> tuple[str, float]:
    policy, _, rest = name.partition(", ")
    number = rest.partition(" ")[0]
    return policy, float(number) if number.isdigit() else 0.0


def _lengths(run: pd.Series) -> pd.Series:
    requests = load_requests(run)
    return requests[requests["error"].isna()].groupby("prompt_id")["output_tokens"].mean()


def _graded(runs: pd.DataFrame, compared: pd.DataFrame | None) -> pd.DataFrame:
    require(len(runs), "run")
    table = compare(runs) if compared is None else compared
    table = table[table["accuracy"].notna()]
    require(len(table), "graded run")
    return table


def _groups(part: pd.DataFrame, names: pd.Series) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name), line) for name, line in part.groupby(names.loc[part.index], sort=True)]


def _errorbar(axis, places: np.ndarray, line: pd.DataFrame, name: str) -> None:
    axis.errorbar(
        places, 100 * line["accuracy"], yerr=_spans(line), label=name, capsize=2, linewidth=1.4, markersize=5,
        **look(name),
    )  # fmt: skip


def _spans(line: pd.DataFrame) -> np.ndarray:
    below, above = line["accuracy"] - line["accuracy.low"], line["accuracy.high"] - line["accuracy"]
    return 100 * np.clip(np.array([below, above], dtype=float), 0, None)


def _full_band(axis, part: pd.DataFrame) -> None:
    full = part[part["policy.name"] == "full"]
    if len(full):
        run = full.iloc[-1]
        axis.axhline(100 * run["accuracy"], color="black", linewidth=1.2, label="full KV")
        axis.axhspan(100 * run["accuracy.low"], 100 * run["accuracy.high"], color="black", alpha=0.12, linewidth=0)
