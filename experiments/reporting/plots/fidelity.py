"""Fidelity to full KV against accuracy, arm by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.analysis.fidelity import PREDICTORS, predicts, shared_arms
from experiments.reporting.plots.style import label, look, one_legend, panels, rank, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_X = {"divergence": "KL(full KV || policy), nats a token", "agreement": "disagreement on the next token (%)"}


def accuracy_by_fidelity(fidelity_runs: pd.DataFrame, accuracy_runs: pd.DataFrame) -> Figure:
    """Accuracy with its 95 % interval against divergence and disagreement, a point for each arm that both have.

    A row of panels for each model and workload. Titles give Spearman's rank correlation with its interval over arms. A
    point is filled where the prompt is protected.

    Args:
        fidelity_runs, accuracy_runs: rows of `load_runs()`.
    """
    arms = shared_arms(fidelity_runs, accuracy_runs)
    require(len(arms), "arm whose fidelity and accuracy were both measured")
    found = predicts(fidelity_runs, accuracy_runs).set_index(["model.name", "workload.name", "figure"])
    groups = [
        (*key, figure, part) for key, part in arms.groupby(["model.name", "workload.name"]) for figure in PREDICTORS
    ]
    several = arms["model.name"].nunique() > 1
    titles = []
    for model, workload, figure, _ in groups:
        title = f"{workload} ({model})" if several else workload
        if (model, workload, figure) in found.index:
            value, low, high = found.loc[(model, workload, figure), ["correlation", "low", "high"]]
            sign = -1 if figure == "agreement" else 1  # disagreement is drawn
            low, high = sorted((sign * low, sign * high))
            title += f": rank correlation {sign * value:.2f} [{low:.2f}, {high:.2f}]"
        titles.append(title)
    figure, axes = panels(titles, (4.6, 3.6), columns=len(PREDICTORS))
    for axis, (_, _, name, part) in zip(axes, groups, strict=True):
        for policy, points in sorted(
            part.groupby(part["policy.name"].replace("random_attention", "random")), key=_rank
        ):
            for number, (_, point) in enumerate(points.sort_values("policy.protection").iterrows()):
                style = look(label(point)) | {"linestyle": "none"}
                x = point[name] if name == "divergence" else 100 * (1 - point[name])
                spans = [[100 * max(0, point["accuracy"] - point["accuracy.low"])]]
                spans.append([100 * max(0, point["accuracy.high"] - point["accuracy"])])
                axis.errorbar(
                    [x], [100 * point["accuracy"]], yerr=spans, label=None if number else policy, capsize=0,
                    elinewidth=0.8, markersize=5, **style,
                )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(_X[name], fontsize=9)
        axis.set_ylabel("accuracy (%)", fontsize=9)
    one_legend(figure, axes)
    return figure


def _rank(group: tuple[str, pd.DataFrame]) -> tuple[int, str]:
    return rank(group[0])
