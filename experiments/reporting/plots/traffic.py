"""Requests that arrive over time: latency, goodput and throughput as the rate grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.analysis.comparison import compare
from experiments.reporting.plots.style import Part, line_looks, log_scale, one_legend, panels, require, run_names, split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATES = ("scenario.rate", "scenario.speed", "limit", "workload.options.count")
"""Options that make the rate, which is an axis here; a slower rate may be asked fewer requests."""
TAILS = {"ttft": "time to first token (s)", "itl": "inter-token latency (s)", "e2e": "end to end (s)"}
DEVICES = ("engine.tensor_parallel_size", "engine.data_parallel_size")


def tails_by_rate(runs: pd.DataFrame) -> Figure:
    """TTFT, ITL and E2E against the rate at which requests arrived, a panel for each: p99 marked, p50 thin."""
    parts = _parts(runs)
    titles = [f"{part.title}: {name.upper()}" for part in parts for name in TAILS]
    figure, axes = panels(titles, columns=len(TAILS))
    for number, axis in enumerate(axes):
        part, (name, text) = parts[number // len(TAILS)], [*TAILS.items()][number % len(TAILS)]
        for line, its, style in _lines(part):
            rates = line["rate.offered"].astype(float)
            axis.plot(rates, line[f"{name}.p99"].astype(float), label=its, **style)
            thin = style | {"marker": "none", "linestyle": ":", "linewidth": 1}
            axis.plot(rates, line[f"{name}.p50"].astype(float), label=f"_{its} p50", **thin)
        log_scale(axis)
        _axis(axis, "requests offered a second", text)
    one_legend(figure, axes, neutral=_many(parts))
    return figure


def goodput_by_rate(runs: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Requests a second that were answered within the limits, against those that arrived.

    Args:
        compared: what `compare(runs)` gave with limits on times; without, all answers are in time.
    """
    table = compare(runs) if compared is None else compared
    runs = runs.assign(slo_rate=table["slo_rate"])
    parts = _parts(runs)
    figure, axes = panels([part.title for part in parts])
    for axis, part in zip(axes, parts, strict=True):
        for line, name, style in _lines(part):
            axis.plot(line["rate.offered"].astype(float), line["slo_rate"].astype(float), label=name, **style)
        top = part.runs["rate.offered"].astype(float).max()
        axis.plot([0, top], [0, top], color="#999999", linewidth=0.8, linestyle="-.", label="all that are offered")
        axis.set_ylim(bottom=0)
        _axis(axis, "requests offered a second", "requests in time a second")
    one_legend(figure, axes, neutral=_many(parts))
    return figure


def throughput_by_user(runs: pd.DataFrame) -> Figure:
    """Output tokens a second and GPU against those a second that a user sees, the inverse of the median TPOT."""
    parts = _parts(runs)
    figure, axes = panels([part.title for part in parts])
    for axis, part in zip(axes, parts, strict=True):
        for line, name, style in _lines(part):
            sizes = line.reindex(columns=list(DEVICES)).astype(float).fillna(1).prod(axis=1)
            speed = 1 / line["tpot.p50"].astype(float).replace(0, np.nan)
            axis.plot(speed, line["output_tokens_per_second"].astype(float) / sizes, label=name, **style)
        axis.set_ylim(bottom=0)
        _axis(axis, "tokens a second and user", "tokens a second and GPU")
    one_legend(figure, axes, neutral=_many(parts))
    return figure


def _parts(runs: pd.DataFrame) -> list[Part]:
    """A panel's runs, the arrivals left aside, in which the data of runs at several speeds differ."""
    timed = runs[runs.reindex(columns=["rate.offered"]).astype(float).iloc[:, 0].notna()]
    blank = {name: None for name in ("provenance.data", *RATES) if name in timed}
    alike = timed.assign(**blank)
    parts = split(alike, run_names(alike)) if len(timed) else []
    parts = [part for part in parts if any(line["rate.offered"].nunique() > 1 for line, *_ in _lines(part))]
    require(parts, "requests that arrived over time at several rates (scenario.speed=1,2 or scenario.rate=1,2)")
    return parts


def _lines(part: Part) -> list[tuple[pd.DataFrame, str, dict[str, object]]]:
    """The runs of each name from the lowest rate on, and how they look."""
    names = list(dict.fromkeys(part.names))
    lines = [part.runs[part.names == name].sort_values("rate.offered") for name in names]
    looks = line_looks(pd.DataFrame([line.iloc[0] for line in lines]))
    for line, style in zip(lines, looks, strict=True):
        style["marker"] = "*" if line.iloc[0]["policy.name"] == "full" else style["marker"]
    return list(zip(lines, names, looks, strict=True))


def _axis(axis: Axes, across: str, up: str) -> None:
    axis.set_xlim(left=0)
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(up, fontsize=9)


def _many(parts: list[Part]) -> bool:
    return any(part.policy for part in parts)
