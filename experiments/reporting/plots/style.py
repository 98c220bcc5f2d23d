"""How runs look in every picture: one colour, marker and line for each policy and protection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.config.options import (
    asks,
    budget_texts,
    held_budgets,
    label,
    readable,
    readable_options,
    short_names,
    told_apart,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C564B")
"""Okabe and Ito's palette for the colour-blind, a grey for its yellow and a brown for its black, which is full KV's."""
MARKERS = "osD^vPX<>ph*"
ORDER = (
    *("zipage", "random", "random_attention", "streaming", "h2o", "snapkv", "r_kv", "g_kv"),
    *("tova", "morphkv", "keydiff", "knorm", "vase", "random_shared", "page_attention", "page_random"),
    *("lagkv", "q_filters", "triattention", "expected_attention", "kvzap", "critical", "lazy_eviction"),
)
"""Policies in the order in which they take colours; others follow by name."""

PANEL, SMALL = (4.6, 3.4), (3.1, 2.5)
"""Inches of one panel, for text of 9 points: of one of two beside each other, and of one of three."""
MOST_LINES = 8
"""Names that are told apart in one panel; a panel for each policy where there are more."""
REPETITION = "seed"
"""Runs that differ in this option alone repeat each other."""


def look(name: str) -> dict[str, object]:
    """Colour, marker and line of a label: a policy keeps its colour, protection makes the line whole."""
    policy, _, protection = name.partition(" + ")
    if policy == "full KV":
        return {"color": "black", "marker": "none", "linestyle": "-"}
    policy = policy.partition("@")[0]
    place = ORDER.index(policy) if policy in ORDER else len(ORDER) + sum(map(ord, policy))
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if protection else "--",
        "markerfacecolor": COLOURS[place % len(COLOURS)] if protection else "white",
    }


def evicts(runs: pd.DataFrame) -> pd.Series:
    """Whether each run can evict. Full KV may carry a budget that it never uses."""
    return runs["policy.name"] != "full"


def run_names(runs: pd.DataFrame, budget: bool = True, apart: Sequence[str] = ()) -> pd.Series:
    """What a legend calls each run: its label and budget, and the options that differ where these are the same.

    Args:
        budget: name the budget too.
        apart: options that the picture shows in another way.
    """
    names = runs.apply(label, axis=1).astype(str)
    if budget:
        names += budget_texts(runs, full="").map(lambda text: f", {text}" if text else "")
    told = told_apart(runs)
    options = [name for name in told if name != REPETITION and name not in apart and not asks(name)]
    texts, short = readable_options(runs, options), short_names(options)
    for _, alike in texts.groupby([*_asked(runs, told), names]) if len(runs) else ():
        for option in options if len(alike) > 1 else ():
            if alike[option].nunique() > 1:
                names.loc[alike.index] += f", {short[option]} " + alike[option]
    return names


def _asked(runs: pd.DataFrame, told: Sequence[str]) -> list[pd.Series]:
    """Keys that are equal for runs of the same model that were asked the same problems in the same way.

    Args:
        told: the `told_apart` of the runs.
    """
    data = runs.reindex(columns=["provenance.data"]).iloc[:, 0].astype(object).map(readable).rename("data")
    texts = readable_options(runs, [name for name in told if asks(name)])
    return [runs["workload.name"].map(str), runs["model.name"].map(str), *(texts[name] for name in texts), data]


@dataclass(frozen=True)
class Part:
    """What one panel shows: its title, its runs, and what its legend calls each."""

    title: str
    runs: pd.DataFrame
    names: pd.Series
    workload: str
    policy: str | None = None
    """The only one beside full KV, where the workload has too many for one panel."""


def split(runs: pd.DataFrame, names: pd.Series) -> list[Part]:
    """A panel for each workload; one for each policy of it, with full KV in each, where one would be crowded."""
    parts = []
    for title, part in by_workload(runs):
        labels, budgets = part.apply(label, axis=1), held_budgets(part).fillna(0)
        order = sorted(part.index, key=lambda i: (evicts(part)[i], *rank(labels[i]), budgets[i]))
        part, policies = part.loc[order], labels[order].str.partition(" + ")[0]
        evicting = policies[evicts(part)]
        if names[order].nunique() <= MOST_LINES or evicting.nunique() <= 1:
            parts.append(Part(title, part, names[order], title))
            continue
        for policy in in_order(evicting):
            mine = part[(policies == policy) | ~evicts(part)]
            parts.append(Part(f"{title}: {policy}", mine, without_policy(names[mine.index], policy), title, policy))
    return parts


def without_policy(names: pd.Series, policy: str) -> pd.Series:
    """Names for a panel whose title says the policy."""
    return names.map(lambda name: name.removeprefix(policy).lstrip(" ,+") or "no protection")


def in_order(policies: Iterable[str]) -> list[str]:
    """Each policy once, as `ORDER` has them."""
    return sorted(set(policies), key=rank)


def rank(name: str) -> tuple[int, str]:
    """The place of a policy or label: that of its policy in `ORDER`, then by name."""
    policy = name.partition(" + ")[0].partition(", ")[0].partition("@")[0]
    return (ORDER.index(policy) if policy in ORDER else len(ORDER)), name


def line_looks(runs: pd.DataFrame) -> list[dict[str, object]]:
    """Colour, line and marker of each run's line; of several of one label, each has a marker of its own, and
    the greater budget is the darker."""
    labels = runs.apply(label, axis=1).tolist()
    order = list(zip(held_budgets(runs).fillna(0), range(len(runs))))
    looks = []
    for place, name in zip(order, labels, strict=True):
        alike = [other for other, its in zip(order, labels) if its == name]
        number, first = sorted(alike).index(place), look(name)["marker"]
        shade = 1.0 if len(alike) == 1 else 0.4 + 0.6 * number / (len(alike) - 1)
        own = {"linewidth": 1.0 + 0.6 * shade, "alpha": shade, "markersize": 4}
        if len(alike) > 1:
            start = MARKERS.index(first) if first in MARKERS else 0
            own["marker"] = MARKERS[(start + number) % len(MARKERS)]
        looks.append(look(name) | own)
    return looks


def panels(
    titles: Sequence[str], size: tuple[float, float] | None = None, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of panels with titles, at most `columns` beside each other; many are small and three in a row."""
    many = len(titles) > 4
    size, columns = size or (SMALL if many else PANEL), columns or (3 if many else 2)
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


def same_limits(axes: Iterable[Axes], x: bool = True, y: bool = True) -> None:
    """Give panels that are read beside each other one scale."""
    axes = list(axes)
    left, right = zip(*(axis.get_xlim() for axis in axes))
    bottom, top = zip(*(axis.get_ylim() for axis in axes))
    for axis in axes:
        if x:
            axis.set_xlim(min(left), max(right))
        if y:
            axis.set_ylim(min(bottom), max(top))


def one_legend(figure: Figure, axes: Sequence[Axes], neutral: bool = False) -> None:
    """One legend under all panels, without repetitions. The figure grows by its height.

    Args:
        neutral: names stand for a policy in one panel and for another in the next, so the legend has no colours.
    """
    found = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            found.setdefault(name, handle)
    if not found:
        return
    if neutral:
        found = {name: handle if name == "full KV" else _without_colour(handle) for name, handle in found.items()}
    width = 0.55 + 0.075 * max(map(len, found))  # inches of an entry
    rows = math.ceil(len(found) / max(1, int(figure.get_figwidth() / width)))
    columns = math.ceil(len(found) / rows)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False,
        handlelength=2.6,
    )  # fmt: skip


def _without_colour(handle: object) -> Line2D:
    line = handle if isinstance(handle, Line2D) else handle.lines[0]
    filled = line.get_markerfacecolor() != "white"
    return Line2D(
        [], [], color="#444444", linestyle=line.get_linestyle(), linewidth=line.get_linewidth(), alpha=line.get_alpha(),
        marker=line.get_marker(), markersize=4, markerfacecolor="#444444" if filled else "white",
    )  # fmt: skip


def require(ok: object, what: str) -> None:
    """Raise a ValueError that says what the runs lack."""
    if not ok:
        raise ValueError(f"the runs hold no {what}")


def by_workload(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The runs of each model and workload that were asked the same problems in the same way, with a title.

    The model is named where there are several, and options of the workload where they differ.
    """
    several = runs["model.name"].nunique() > 1
    found = []
    for (workload, model), part in runs.groupby(["workload.name", "model.name"], sort=True):
        keys = [key for key in _asked(part, told_apart(part))[2:] if key.nunique() > 1]
        title = f"{workload} ({model})" if several else str(workload)
        if len(keys) > 1 and keys[-1].name == "data" and _decided(keys[-1], keys[:-1]):
            keys.pop()
        for values, asked in part.groupby(keys, sort=True) if keys else [((), part)]:
            names = [f"{key.name.rpartition('.')[2]} {value[:12]}" for key, value in zip(keys, values, strict=True)]
            found.append((", ".join([title, *names]), asked))
    return found


def _decided(key: pd.Series, by: list[pd.Series]) -> bool:
    """Whether the values of `by` together decide that of `key`."""
    return key.groupby(by).nunique().max() == 1
