"""Pictures of chains, conversations and fidelity show the numbers of the runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import records, report
from experiments.analysis.statistics import clustered_mean
from experiments.records import load_runs
from experiments.reporting import plots
from tests.experiments.made_runs import make_run
from tests.experiments.reporting.pictures import axes_of, ends_of


@pytest.fixture
def folder(tmp_path):
    """Conversations of two questions and two recalls, 700 and 1,400 tokens back."""
    for name, policy, second in (("a", "full", 20), ("b", "zipage", 5)):
        places = [[1.0, float(i < second)] for i in range(40)]
        recalls = [[float(i < 30), float(i < second)] for i in range(40)]
        make_run(tmp_path, name, policy, 64, grades=[0.5] * 40, places=places, recalls=recalls)
    return tmp_path


def drawn_in(axis) -> dict[str, list[float]]:
    return {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in axis.containers}


def test_accuracy_by_place_with_intervals(folder):
    (axis,) = axes_of(plots.accuracy_by_place(load_runs(folder))).values()
    assert axis.get_title() == "sums, budget 64"
    assert drawn_in(axis) == {"full KV": [100, 50], "zipage, 64": [100, 12.5]}
    assert axis.get_xticks().tolist() == [1, 2]
    shown = clustered_mean([1.0] * 5 + [0.0] * 35, range(40))
    assert (round(100 * shown.low, 6), round(100 * shown.high, 6)) in ends_of(axis)


def test_recall_by_distance(folder):
    (axis,) = axes_of(plots.recall_by_distance(load_runs(folder))).values()
    assert drawn_in(axis) == {"full KV": [75, 50], "zipage, 64": [75, 12.5]}
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["500–\n1,000", "1,000–\n2,000"]


def test_fidelity_is_drawn_against_accuracy(tmp_path):
    for i in range(5):
        make_run(tmp_path, f"acc-{i}", "zipage", 64 * (i + 1), grades=[1.0] * (10 + i) + [0.0] * (10 - i))
        run = make_run(tmp_path, f"fid-{i}", "zipage", 64 * (i + 1), grades=[None] * 20)
        metrics = json.loads((run / records.METRICS).read_text())
        metrics["fidelity"] = {"divergence": 0.1 / (i + 1), "agreement": 1 - 0.1 / (i + 1)}
        (run / records.METRICS).write_text(json.dumps(metrics))
    runs = load_runs(tmp_path)
    figure = plots.accuracy_by_fidelity(runs, runs)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["sums: rank correlation -1.00 [-1.00, -1.00]"] * 2
    points = [bars.lines[0].get_xydata()[0].tolist() for bars in figure.axes[0].containers]
    assert np.array(points) == pytest.approx(np.array([[0.1 / (i + 1), 50 + 5 * i] for i in range(5)]))


@pytest.mark.parametrize("draw", [plots.accuracy_by_place, plots.recall_by_distance])
def test_what_runs_lack_is_said(tmp_path, draw):
    make_run(tmp_path, "a")
    with pytest.raises(ValueError, match="the runs hold no run of c"):
        draw(load_runs(tmp_path))


def test_the_command_writes_the_pictures_that_apply(folder, tmp_path, capsys):
    assert report.main([str(folder), "--pictures", str(tmp_path / "drawn")]) == 0
    written = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert {"accuracy-by-place.png", "recall-by-distance.png", "accuracy-against-throughput.png"} <= written
    assert "accuracy-against-fidelity.png" not in written
    assert capsys.readouterr().out.splitlines()[-1].startswith("pictures: ")
