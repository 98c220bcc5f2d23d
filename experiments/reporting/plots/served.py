"""Servers under load: tails, goodput and throughput as the rate grows, of `scenario=serve_bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from experiments.reporting.plots.style import COLOURS, MARKERS, log_scale, one_legend, panels, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TAILS = {"ttft": "time to first token (s)", "itl": "inter-token latency (s)", "e2e": "end to end (s)"}
RATE = "requests offered a second"


def served_traffic(rows: pd.DataFrame) -> Figure:
    """A row of panels for each load, a line for each server: TTFT, ITL and E2E against the rate (p99 marked, p50 thin,
    limits dashed), goodput against the rate, and tokens/s and GPU against tokens/s and user.
    """
    require("rate" in rows and rows["rate"].notna().any(), "rate at which a server was measured")
    rows = rows[rows["rate"].notna() & rows["refused"].isna()]
    require(len(rows), "rate at which a server was measured")
    titles, parts = [], []
    for load, part in rows.groupby("load", sort=False):
        titles += [f"{load}: {name}" for name in (*map(str.upper, TAILS), "goodput", "throughput")]
        parts.append(part)
    figure, axes = panels(titles, columns=len(TAILS) + 2)
    for number, part in enumerate(parts):
        own = axes[number * (len(TAILS) + 2) :]
        for axis, (name, text) in zip(own, TAILS.items()):
            _tail(axis, part, name, text)
        _goodput(own[len(TAILS)], part)
        _throughput(own[len(TAILS) + 1], part)
    one_legend(figure, axes)
    return figure


def _lines(part: pd.DataFrame) -> list[tuple[str, pd.DataFrame, dict[str, object]]]:
    """The rows of each server from the lowest rate on, and how they look: full KV is black."""
    lines = []
    for number, (arm, mine) in enumerate(part.groupby("arm", sort=False)):
        ours = mine["backend"].iloc[0] == "zipage" and mine["policy"].iloc[0] == "full"
        style = {"color": "black" if ours else COLOURS[number % len(COLOURS)], "markersize": 4}
        style["marker"] = "*" if ours else MARKERS[number % len(MARKERS)]
        lines.append((str(arm), mine.sort_values("rate"), style))
    return lines


def _tail(axis: Axes, part: pd.DataFrame, name: str, text: str) -> None:
    for arm, mine, style in _lines(part):
        known = mine[mine[name].notna()]
        axis.plot(known["rate"], [times["p99"] for times in known[name]], label=arm, **style)
        thin = style | {"marker": "none", "linestyle": ":", "linewidth": 1}
        axis.plot(known["rate"], [times["p50"] for times in known[name]], label=f"_{arm} p50", **thin)
    limit = part["slo"].iloc[0].get(name)
    if limit is not None and pd.notna(limit):
        axis.axhline(limit, color="#999999", linewidth=0.8, linestyle="-.", label="_limit")
    log_scale(axis)
    _axis(axis, RATE, text)


def _goodput(axis: Axes, part: pd.DataFrame) -> None:
    for arm, mine, style in _lines(part):
        axis.plot(mine["rate"], mine["goodput"], label=arm, **style)
    top = part["rate"].max()
    axis.plot([0, top], [0, top], color="#999999", linewidth=0.8, linestyle="-.", label="_all that are offered")
    axis.set_ylim(bottom=0)
    _axis(axis, RATE, "requests in time a second")


def _throughput(axis: Axes, part: pd.DataFrame) -> None:
    for arm, mine, style in _lines(part):
        known = mine[mine["tokens_per_second_user"].notna()]
        axis.plot(known["tokens_per_second_user"], known["tokens_per_second"] / known["gpus"], label=arm, **style)
    axis.set_ylim(bottom=0)
    _axis(axis, "tokens a second and user", "tokens a second and GPU")


def _axis(axis: Axes, across: str, up: str) -> None:
    axis.set_xlim(left=0)
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(up, fontsize=9)
