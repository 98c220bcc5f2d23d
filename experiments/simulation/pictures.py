"""`python -m experiments.simulation.pictures RECORD... --out FILE`: GPUs needed against traffic."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.command_line import Parser
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.simulation.pictures", description="GPUs against traffic, simulated.")
    parser.add_argument("records", nargs="+", type=Path, help="of python -m experiments.simulate capacity --out")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    borne: dict[str, dict[int, float]] = {}
    for path in options.records:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, fleets in record["borne"].items():
            borne.setdefault(name, {}).update({int(gpus): rate for gpus, rate in fleets.items()})
    gpus_against_traffic(borne, record["simulated"]["name"]).savefig(options.out, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
