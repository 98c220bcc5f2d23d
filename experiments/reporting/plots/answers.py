"""What eviction does to answers: facts lost, thoughts drawn out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.analysis.comparison import compare
from experiments.analysis.statistics import Interval, clustered_mean
from experiments.config.options import held_budgets
from experiments.records import load_requests
from experiments.reporting.plots.style import (
    by_workload,
    evicts,
    label,
    line_looks,
    look,
    one_legend,
    panels,
    rank,
    require,
    run_names,
    split,
    without_policy,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS, FEWEST = 5, 10
"""Groups of facts by distance, of equal size, and the facts that each has at least."""


def facts_by_distance(runs: pd.DataFrame) -> Figure:
    """Share of the facts known against how far back they were stated, with full KV in every panel.

    A panel for each workload and budget, or for each policy where these are many. Points are groups of equal size,
    with 95 % intervals over problems.
    """
    known = {index: facts for index, run in runs.iterrows() if (facts := _facts(run)) is not None}
    runs = runs.loc[list(known)]
    require(len(runs), "run whose problems name facts")
    parts = []
    for part in split(runs, run_names(runs, budget=False)):
        held = held_budgets(part.runs)
        budgets = sorted(held[evicts(part.runs)].dropna().unique())
        if part.policy or len(budgets) < 2:
            title = f"{part.title}, budget {budgets[0]:,.0f}" if len(budgets) == 1 else part.title
            parts.append((title, part.runs, part.policy))
            continue
        for budget in budgets:
            same = part.runs[~evicts(part.runs) | (held == budget)]
            parts.append((f"{part.title}, budget {budget:,.0f}", same, None))
    figure, axes = panels([title for title, _, _ in parts])
    points = {index: known_by_distance(facts) for index, facts in known.items()}
    for axis, (_, same, policy) in zip(axes, parts, strict=True):
        names = run_names(same, budget=policy is not None)
        if policy:
            names = without_policy(names, policy)
        for index, name, style in zip(same.index, names, line_looks(same), strict=True):
            centres, shares = points[index]
            spans = np.array([[share.value - share.low, share.high - share.value] for share in shares]).T
            values = [100 * share.value for share in shares]
            axis.errorbar(
                centres, values, yerr=100 * spans.clip(0), label=name, capsize=0 if policy else 2, elinewidth=0.8,
                **style,
            )  # fmt: skip
        axis.set_ylim(-3, 103)
        axis.set_xlim(left=0)
        axis.set_xlabel("distance back (characters)", fontsize=9)
        axis.set_ylabel("facts known (%)", fontsize=9)
    one_legend(figure, axes, neutral=any(policy for _, _, policy in parts))
    return figure


def _facts(run: pd.Series) -> pd.DataFrame | None:
    requests = load_requests(run)
    if "fact_distances" not in requests or requests["fact_distances"].isna().all():
        return None
    return requests.dropna(subset="fact_distances")


def known_by_distance(requests: pd.DataFrame, bins: int = BINS) -> tuple[list[float], list[Interval]]:
    """Mean distances of groups of facts, and the share of each that was known as an `Interval` over problems."""
    facts = requests[["prompt_id", "fact_distances", "facts_known"]].explode(["fact_distances", "facts_known"])
    facts = facts.astype({"fact_distances": float, "facts_known": float})
    groups = pd.qcut(
        facts["fact_distances"].rank(method="first"), min(bins, max(1, len(facts) // FEWEST)), labels=False
    )
    centres, known = [], []
    for _, group in facts.groupby(groups):
        centres.append(group["fact_distances"].mean())
        known.append(clustered_mean(group["facts_known"].tolist(), group["prompt_id"].tolist()))
    return centres, known


def length_inflation(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """How much longer each answer is than under full KV on the same problem: medians, quartiles, 5 and 95 %."""
    require(len(runs), "run")
    table = compare(runs) if compared is None else compared
    table = table[table["full.run"].notna()]
    require(len(table), "evicting run with full KV beside it")
    paths = dict(zip(runs["run"], runs["path"]))
    names, ratios = run_names(runs).loc[table.index], {}
    for index, row in table.iterrows():
        ratio = (_lengths(row["path"]) / _lengths(paths[row["full.run"]])).replace(np.inf, np.nan).dropna()
        ratios[index] = ratio.to_numpy()
    table = table[[np.any(ratios[i] != 1) for i in table.index]]  # where lengths are given, none differs
    require(len(table), "answer that is longer or shorter than that of full KV")
    parts = by_workload(table)
    most = max(len(part) for _, part in parts)
    figure, axes = panels([title for title, _ in parts], (7.5 if len(parts) == 1 else 4.9, 1.2 + 0.24 * most), 2)
    for axis, (_, part) in zip(axes, parts, strict=True):
        order = sorted(part.index, key=lambda i: (rank(label(part.loc[i])), part.loc[i, "budget"]))
        boxes = axis.boxplot(
            [ratios[i] for i in order], orientation="horizontal", whis=(5, 95), showfliers=False, patch_artist=True
        )
        for box, i in zip(boxes["boxes"], order, strict=True):
            style = look(label(part.loc[i]))
            box.set(facecolor=style["color"], alpha=0.7, linestyle=style["linestyle"])
        for line in boxes["medians"]:
            line.set_color("black")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(1, len(order) + 1), names[order], fontsize=8)
        axis.set_ylim(len(order) + 0.7, 0.3)
        axis.set_xlabel("output tokens / output tokens of full KV", fontsize=9)
    return figure


def _lengths(path: str) -> pd.Series:
    requests = load_requests(path)
    return requests[requests["error"].isna()].groupby("prompt_id")["output_tokens"].mean()
