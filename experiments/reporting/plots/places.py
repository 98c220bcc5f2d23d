"""Chains and conversations: accuracy by the place of a question, recalls by how far back they ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.analysis.metrics import DISTANCES
from experiments.analysis.statistics import Interval, clustered_mean
from experiments.config.options import held_budgets
from experiments.records import load_requests
from experiments.reporting.plots.style import (
    evicts,
    line_looks,
    one_legend,
    panels,
    require,
    run_names,
    same_limits,
    split,
    without_policy,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 10
"""Questions or recalls that a point stands for at least."""

Grades = pd.DataFrame
"""Columns prompt_id, place (or group of distances) and grade, a row for each graded question or recall."""


def accuracy_by_place(runs: pd.DataFrame) -> Figure:
    """Accuracy at each place of a chain or conversation with 95 % intervals over problems, full KV in every panel.

    Many policies have a panel each.
    """
    graded = _grades(runs, _by_place, "run of chains or conversations")
    figure = _draw(runs.loc[list(graded)], graded, "place of the question", "accuracy (%)")
    for axis in figure.axes:
        axis.set_xticks(sorted({place for grades in graded.values() for place in grades["place"]}))
    return figure


def recall_by_distance(runs: pd.DataFrame) -> Figure:
    """Share of the recalls answered right in each group of `DISTANCES`, with 95 % intervals over conversations.

    Many policies have a panel each, with full KV in every one. A group of fewer than `FEWEST` recalls has no point.
    """
    graded = _grades(runs, _by_distance, "run of conversations with recalls")
    figure = _draw(runs.loc[list(graded)], graded, "tokens back to what is asked for", "recalls right (%)")
    names = [f"{a:,}–\n{b:,}" if b != math.inf else f"{a:,}+" for a, b in pairwise((*DISTANCES, math.inf))]
    held = sorted({place for grades in graded.values() for place in by_place(grades)})
    for axis in figure.axes:
        axis.set_xticks(held, [names[place] for place in held])
    return figure


def by_place(grades: Grades) -> dict[int, Interval]:
    """The mean grade at each place that has `FEWEST` grades, as an `Interval` over problems."""
    return {
        int(place): clustered_mean(same["grade"].tolist(), same["prompt_id"].tolist())
        for place, same in grades.groupby("place")
        if len(same) >= FEWEST
    }


def _grades(runs: pd.DataFrame, read: Callable[[pd.DataFrame], Grades | None], what: str) -> dict[object, Grades]:
    found = {index: grades for index, run in runs.iterrows() if (grades := read(load_requests(run))) is not None}
    require(found, what)
    return found


def _by_place(requests: pd.DataFrame) -> Grades | None:
    rows = requests.reindex(columns=["prompt_id", "place_grades"]).dropna()
    if rows.empty:
        return None
    rows = rows.assign(place=[range(1, len(grades) + 1) for grades in rows["place_grades"]])
    return rows.explode(["place_grades", "place"]).rename(columns={"place_grades": "grade"})


def _by_distance(requests: pd.DataFrame) -> Grades | None:
    rows = requests.reindex(columns=["prompt_id", "recall_grades", "recall_distances"]).dropna()
    rows = [
        (row.prompt_id, grade, int(np.searchsorted(DISTANCES, distance, side="right")) - 1)
        for row in rows.itertuples()
        for grade, distance in zip(row.recall_grades, row.recall_distances, strict=False)
        if distance is not None and not np.isnan(distance)
    ]
    return pd.DataFrame(rows, columns=["prompt_id", "grade", "place"]) if rows else None


def _draw(runs: pd.DataFrame, graded: dict[object, Grades], x: str, y: str) -> Figure:
    parts = split(runs, run_names(runs, budget=False))
    titles = []
    for part in parts:
        budgets = sorted(held_budgets(part.runs)[evicts(part.runs)].dropna().unique())
        titles.append(part.title + (f", budget {budgets[0]:,.0f}" if len(budgets) == 1 else ""))
    figure, axes = panels(titles)
    for axis, part in zip(axes, parts, strict=True):
        names = run_names(part.runs)
        if part.policy:
            names = without_policy(names, part.policy)
        for number, (index, name, style) in enumerate(zip(part.runs.index, names, line_looks(part.runs), strict=True)):
            found = by_place(graded[index])
            shift = 0.06 * (number - (len(part.runs) - 1) / 2)  # so that intervals do not hide each other
            shares = list(found.values())
            spans = np.array([[share.value - share.low, share.high - share.value] for share in shares]).T
            axis.errorbar(
                np.array(list(found)) + shift, [100 * share.value for share in shares], yerr=100 * spans.clip(0),
                label=name, capsize=0, elinewidth=0.8, **style,
            )  # fmt: skip
        axis.set_ylim(bottom=0)
        axis.set_xlabel(x, fontsize=9)
        axis.set_ylabel(y, fontsize=9)
    for workload in {part.workload for part in parts}:
        same_limits(axis for part, axis in zip(parts, axes, strict=True) if part.workload == workload)
    one_legend(figure, axes, neutral=any(part.policy for part in parts))
    return figure
