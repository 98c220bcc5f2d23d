"""GPUs needed against traffic."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from experiments.reporting.plots.style import COLOURS, PANEL
from experiments.simulation.capacity import gpus_needed

MOST_TRAFFIC = 1000.0


def gpus_against_traffic(borne: Mapping[str, Mapping[int, float]], machine: str) -> Figure:
    """A line for each name; dotted beyond the largest fleet that was simulated."""
    figure = Figure(figsize=(1.4 * PANEL[0], 1.2 * PANEL[1]), layout="constrained")
    axes = figure.add_subplot()
    traffic = np.geomspace(0.5, MOST_TRAFFIC, 400)
    colours = iter(COLOURS)
    for name, fleets in borne.items():
        colour = "black" if name == "full KV" else next(colours)
        edge = max(fleets.values())
        for inside, line in ((traffic <= edge, "-"), (traffic > edge, ":")):
            gpus = [gpus_needed(rate, fleets) for rate in traffic[inside]]
            axes.plot(traffic[inside], gpus, line, color=colour, label=name if line == "-" else None)
    axes.set(xscale="log", yscale="log", xlabel="requests a second", ylabel=f"{machine}s that hold the limits")
    axes.set_title("GPUs needed against traffic (simulated)", fontsize=10)
    axes.legend(title="simulated; dotted: beyond the largest fleet simulated", title_fontsize=7, fontsize=8)
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    return figure
