"""How runs look in every picture: one colour, marker and line for each policy and protection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
"""Okabe and Ito's palette for the colour-blind, a grey for its yellow and a brown for its black, which is full KV's."""
MARKERS = "osD^vPX<>ph*"
ORDER = (
    *("zipage", "random", "random_attention", "streaming", "h2o", "snapkv", "r_kv", "g_kv"),
    *("tova", "morphkv", "keydiff", "knorm", "vase", "random_shared", "page_attention", "page_random"),
)
"""Policies in the order in which they take colours; others follow by name."""

PANEL = (4.6, 3.4)
"""Inches of one panel, for text of 9 points."""


def label(run: pd.Series) -> str:
    """`zipage`, `zipage + prompt`, `full KV`."""
    name, protection = run["policy.name"], run["policy.protection"]
    if name == "full":
        return "full KV"
    name, protection = ("random", "prompt") if name == "random_attention" else (name, protection)
    return name if protection == "none" else f"{name} + {protection}"


def look(name: str) -> dict[str, object]:
    """Colour, marker and line of a label: a policy keeps its colour, protection makes the line whole."""
    policy, _, protection = name.partition(" + ")
    if policy == "full KV":
        return {"color": "black", "marker": "none", "linestyle": "-"}
    place = ORDER.index(policy) if policy in ORDER else len(ORDER) + sum(map(ord, policy))
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if protection else "--",
        "markerfacecolor": COLOURS[place % len(COLOURS)] if protection else "white",
    }


def line_of(run: pd.Series, among: pd.DataFrame) -> dict[str, object]:
    """Colour and line of a run without markers; of several budgets of one label, the greater is the darker."""
    name = label(run)
    style = look(name)
    alike = among[among.apply(label, axis=1) == name]["policy.budget_tokens"].dropna().unique()
    rank = sum(budget <= run["policy.budget_tokens"] for budget in alike) if len(alike) > 1 else 1
    shade = 0.4 + 0.6 * rank / len(alike) if len(alike) > 1 else 1.0
    return {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.0 + 0.6 * shade, "alpha": shade}


def panels(titles: Sequence[str], size: tuple[float, float] = PANEL, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of panels with titles, at most `columns` beside each other."""
    across = min(columns, len(titles))
    down = math.ceil(len(titles) / across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=9)
        axis.grid(True, color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[: len(titles)]


def one_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all panels, without repetitions."""
    found = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            found.setdefault(name, handle)
    if found:
        columns = min(len(found), max(1, int(figure.get_figwidth() / 2.1)))
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
        )


def require(ok: object, what: str) -> None:
    """Raise a ValueError that says what the runs lack."""
    if not ok:
        raise ValueError(f"the runs hold no {what}")


def by_workload(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The runs of each model and workload, with a title; the model is named where there are several."""
    several = runs["model.name"].nunique() > 1
    return [
        (f"{workload} ({model})" if several else workload, part)
        for (workload, model), part in runs.groupby(["workload.name", "model.name"], sort=True)
    ]
