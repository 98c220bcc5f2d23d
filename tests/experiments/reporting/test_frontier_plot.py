"""The picture of accuracy against speed shows the numbers of the runs, pool by pool."""

from __future__ import annotations

import pytest

from experiments.analysis.frontier import frontier
from experiments.records import load_runs
from experiments.reporting import pictures, plots
from experiments.reporting.page import page
from tests.experiments.made_runs import make_run
from tests.experiments.reporting.pictures import axes_of, ends_of, legend_of, right

POOL = "engine.kv_cache_memory_bytes"


@pytest.fixture
def runs(tmp_path):
    for gib, seconds in ((2, 20), (4, 12)):
        pool = {POOL: gib * 2**30}
        make_run(tmp_path, f"full-{gib}", grades=right(240, 400), seconds=seconds, options=pool)
        make_run(tmp_path, f"big-{gib}", "r_kv", 128, grades=right(240, 400), seconds=10, options=pool)
        make_run(tmp_path, f"small-{gib}", "r_kv", 64, grades=right(100, 400), seconds=8, options=pool)
    return load_runs(tmp_path)


def upright(axis) -> list[float]:
    return [round(line.get_xdata()[0], 6) for line in axis.lines if list(line.get_ydata()) == [0, 1]]


def test_a_panel_for_each_pool_with_the_line_through_its_budgets(runs):
    figure = plots.accuracy_by_speed_up(runs)
    panels = axes_of(figure)
    assert list(panels) == ["sums, 2 GiB", "sums, 4 GiB"]  # from the least throughput of full KV
    for title, speeds in (("sums, 2 GiB", [2.5, 2]), ("sums, 4 GiB", [1.5, 1.2])):
        drawn = {c.get_label(): c.lines[0] for c in panels[title].containers}
        assert drawn["r_kv"].get_xdata().tolist() == pytest.approx(speeds)
        assert drawn["r_kv"].get_ydata().tolist() == pytest.approx([25, 60])
        assert drawn["full KV"].get_xdata().tolist() == [1]
        assert upright(panels[title]) == pytest.approx([1, 2.1, speeds[1]])  # the smaller budget is faster, and fails
        assert [round(line.get_ydata()[0], 6) for line in panels[title].lines if list(line.get_xdata()) == [0, 1]] == [
            57
        ]
    table = frontier(runs)
    assert {
        (round(100 * low, 6), round(100 * high, 6)) for low, high in table[["accuracy.low", "accuracy.high"]].values
    } <= {end for axis in panels.values() for end in ends_of(axis)}
    assert sorted(legend_of(figure)) == [
        "2.1 x (published)",
        "95 % of full KV",
        "best that keeps 95 %",
        "full KV",
        "r_kv",
    ]


def test_what_the_runs_lack_is_said(tmp_path, runs):
    with pytest.raises(ValueError, match="full KV and of an evicting policy in one pool"):
        plots.accuracy_by_speed_up(runs[runs["policy.name"] == "full"])


def test_the_page_has_picture_and_table_where_pools_are_shared(runs, monkeypatch):
    drawn = pictures.pictures
    monkeypatch.setattr(
        pictures, "pictures", lambda *told: (each for each in drawn(*told) if each[0].startswith("Accuracy against sp"))
    )
    text = page(runs)
    assert "Accuracy against speed in the same memory</h2>" in text
    assert "<h2>Accuracy kept in the same memory</h2>" in text
    alone = page(runs[runs["policy.name"] != "full"])
    assert "<h2>Accuracy kept in the same memory</h2>" not in alone
    assert "Accuracy against speed in the same memory: the runs hold no graded run of full KV" in alone
