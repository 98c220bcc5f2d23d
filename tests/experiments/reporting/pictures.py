"""What the tests of pictures draw, and what they read from the panels."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.records import load_runs
from tests.experiments.made_runs import make_run

POOL, LOAD = "engine.num_blocks", "engine.max_num_seqs"


def axes_of(figure: Figure) -> dict[str, Axes]:
    """The panels, by their titles."""
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def lines_of(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The data of the lines that the legend names."""
    named = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


def ends_of(axis: Axes) -> set[tuple[float, float]]:
    """The lower and upper ends of all vertical intervals."""
    segments = [
        segment for group in axis.collections if hasattr(group, "get_segments") for segment in group.get_segments()
    ]
    return {
        (round(float(s[0][1]), 6), round(float(s[1][1]), 6)) for s in segments if len(s) == 2 and s[0][0] == s[1][0]
    }


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def right(count: int, of: int = 40) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two workloads; in the first, two policies at two budgets and one that never bound."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, "a-full", grades=right(30))
    make_run(folder, "b-zip-64", "zipage", 64, grades=right(10), lengths=[150] * 40, seconds=4)
    make_run(folder, "c-zip-128", "zipage", 128, grades=right(25), lengths=[110] * 40, seconds=5)
    make_run(folder, "d-rnd-64", "random", 64, "prompt", grades=right(15), seconds=3)
    make_run(folder, "e-rnd-128", "random", 128, "prompt", grades=right(12), seconds=6)
    other = {"workload.name": "traces"}
    make_run(folder, "f-full", grades=right(40), options=other)
    make_run(folder, "g-zip-64", "zipage", 64, grades=right(20), options=other)
    return folder


@pytest.fixture
def runs(made) -> pd.DataFrame:
    return load_runs(made)
