"""Benchmarks against their roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from experiments.reporting.plots.style import COLOURS, PANEL, one_legend, panels, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {"zipage": (COLOURS[0], "o"), "vllm": (COLOURS[1], "s"), "vllm_matched": (COLOURS[4], "D")}
OTHER = (COLOURS[6], "^")


def against_roofline(rows: pd.DataFrame) -> Figure:
    """Tokens a second of each engine, with the range of its repeats, beside the floor's: a panel for each load.

    Of kernels: the share of the roofline that each reaches.
    """
    return _kernels(rows) if "kernel" in rows else _engines(rows)


def _engines(rows: pd.DataFrame) -> Figure:
    require(len(rows) and "tokens_per_second" in rows, "row that was timed")
    rows = rows[rows["tokens_per_second"].notna()]
    loads = list(dict.fromkeys(rows["load"]))
    figure, axes = panels(loads)
    for axis, load in zip(axes, loads, strict=True):
        part = rows[rows["load"] == load].reset_index(drop=True)
        for place, row in part.iterrows():
            colour, marker = LOOKS.get(row["backend"], OTHER)
            middle = row["tokens_per_second"]
            spread = [[middle - row["lowest"]], [row["highest"] - middle]]
            style = {"color": colour, "marker": marker, "linestyle": "none", "label": row["backend"], "capsize": 3}
            axis.errorbar([middle], [place], xerr=spread, **style)
            floor = row.get("floor_tokens_per_second")
            if pd.notna(floor):
                floor_style = {"color": "black", "marker": "|", "markersize": 16, "linestyle": "none"}
                axis.plot([floor], [place], label="roofline", **floor_style)
        axis.set_yticks(range(len(part)), part["arm"])
        axis.set_ylim(len(part) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_xlabel("tokens a second")
    one_legend(figure, axes)
    return figure


def _kernels(rows: pd.DataFrame) -> Figure:
    require("of_roofline" in rows and rows["of_roofline"].notna().any(), "share of a roofline; they need a GPU")
    rows = rows[rows["of_roofline"].notna()].reset_index(drop=True)
    width, height = PANEL
    figure, (axis,) = panels(["kernels"], (1.5 * width, max(height, 0.3 * len(rows))))
    axis.barh(rows.index, 100 * rows["of_roofline"], color=COLOURS[0], height=0.6)
    axis.axvline(100, color="black", linewidth=1)
    axis.set_yticks(rows.index, rows["kernel"] + ", " + rows["shape"], fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("share of the roofline (%)")
    return figure
