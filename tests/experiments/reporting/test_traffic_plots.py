"""Tables and pictures of requests that arrive over time show the numbers of the runs."""

from __future__ import annotations

import pytest

from experiments import report
from experiments.analysis.comparison import compare
from experiments.records import load_runs
from experiments.reporting import pictures, plots
from experiments.reporting.runs_table import latency_table
from tests.experiments.made_runs import make_run
from tests.experiments.reporting.pictures import axes_of, legend_of, lines_of

GAPS = {1: 1.0, 2: 0.5, 4: 0.25}
"""Seconds between two requests, by speed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Full KV and a policy at three speeds of one trace; at the same gap, request i of 10 has a TTFT of 0.1 (i + 1)."""
    folder = tmp_path_factory.mktemp("traffic")
    for speed, gap in GAPS.items():
        for name, policy, budget in (("full", "full", None), ("zip", "zipage", 64)):
            make_run(
                folder,
                f"{name}-{speed}",
                policy,
                budget,
                grades=[None] * 10,
                arrivals=[gap * i for i in range(10)],
                seconds=20 / speed,
                options={"scenario.arrival": "trace", "scenario.speed": float(speed), "workload.grader": "none"},
                origin={"data": f"d{speed}"},
            )
    return folder


@pytest.fixture
def runs(folder):
    return load_runs(folder)


def test_tails_are_drawn_against_the_offered_rate(runs):
    figure = plots.tails_by_rate(runs)
    panels = axes_of(figure)
    assert list(panels) == ["sums: TTFT", "sums: ITL", "sums: E2E"], "one panel for all speeds, whose data differ"
    rates, tail = lines_of(panels["sums: TTFT"])["full KV"]
    assert rates == [1, 2, 4]
    assert tail == pytest.approx([runs["ttft.p99"].iloc[0]] * 3)
    dotted = [line for line in panels["sums: TTFT"].lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [pytest.approx([0.55] * 3)] * 2
    assert legend_of(figure) == ["full KV", "zipage, 64"]


def test_goodput_counts_requests_in_time(runs):
    (axis,) = plots.goodput_by_rate(runs, compare(runs, ttft=0.55)).axes
    assert lines_of(axis)["zipage, 64"] == ([1, 2, 4], [0.25, 0.5, 1.0])
    assert lines_of(axis)["all that are offered"] == ([0, 4], [0, 4])
    (axis,) = plots.goodput_by_rate(runs).axes
    assert lines_of(axis)["full KV"][1] == [0.5, 1.0, 2.0], "without a limit, all answers"


def test_throughput_is_of_a_gpu_and_speed_of_a_user(runs):
    runs["engine.tensor_parallel_size"] = 2
    (axis,) = plots.throughput_by_user(runs).axes
    speeds, rates = lines_of(axis)["full KV"]
    assert speeds == pytest.approx([1 / 0.055] * 3)
    assert rates == pytest.approx([1000 / 20 / 2, 1000 / 10 / 2, 1000 / 5 / 2])


@pytest.mark.parametrize("draw", [plots.tails_by_rate, plots.goodput_by_rate, plots.throughput_by_user])
def test_what_the_runs_lack_is_said(runs, tmp_path, draw):
    make_run(tmp_path, "at-once")
    for lacking in (load_runs(tmp_path), runs.iloc[:1]):
        with pytest.raises(ValueError, match="requests that arrived over time at several rates"):
            draw(lacking)


def test_the_limits_of_a_run_count_requests_that_keep_them_all(runs):
    table = compare(runs, ttft=0.75, tpot=0.065, e2e=2.25)
    assert table["slo_share"].tolist() == [0.4] * 6, "the end comes first: 0.5 s for each"
    assert table["slo_rate"].tolist() == [4 * speed / 20 for speed in (1, 2, 4)] * 2
    assert compare(runs, ttft=0.75, tpot=0.065)["slo_share"].tolist() == [0.6] * 6


def test_errors_are_not_in_time(tmp_path):
    make_run(tmp_path, "a", grades=[None] * 4, errors=[None, "too long", None, None])
    assert compare(load_runs(tmp_path))["slo_share"].tolist() == [0.75]


def test_the_table_has_rates_tails_and_goodput(runs, folder, capsys):
    lines = latency_table(runs, wide=True).splitlines()
    assert all(f"{name} p50 / p90 / p99" in lines[0] for name in ("TTFT", "ITL", "TPOT", "E2E"))
    assert "0.550 / 0.910 / 0.991" in lines[2]
    assert "goodput" not in lines[0]
    assert max(map(len, latency_table(runs).splitlines())) <= 110
    assert report.main([str(folder), "--slo", "ttft=0.55"]) == 0
    out = capsys.readouterr().out
    assert "TTFT p50/90/99 s" in out
    assert "goodput/s" in out
    assert "50.0%" in out


@pytest.mark.parametrize("limits", ["ttft", "ttft=", "ttft=-1", "first=2", "ttft=2,,tpot=1", "ttft=nan"])
def test_wrong_limits_are_one_line(folder, capsys, limits):
    with pytest.raises(SystemExit) as caught:
        report.main([str(folder), "--slo", limits])
    assert caught.value.code == 2
    assert "must be ttft=SECONDS or tpot=SECONDS or e2e=SECONDS" in capsys.readouterr().err


def test_the_pictures_are_written(runs, folder, tmp_path, monkeypatch):
    chosen = [picture for picture in pictures.pictures(runs, compare(runs)) if "against" in picture[0]][-3:]
    monkeypatch.setattr(pictures, "pictures", lambda runs, compared: iter(chosen))
    assert report.main([str(folder), "--pictures", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    traffic = {"tails-against-rate.png", "goodput-against-rate.png", "throughput-against-speed-for-a-user.png"}
    assert names == traffic
