"""Pictures of accuracy, by budget, policy and throughput, show the numbers of the runs."""

# ruff: noqa: F811

from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.comparison import compare
from experiments.records import load_runs
from experiments.reporting import plots
from experiments.reporting.plots import style
from experiments.reporting.plots.accuracy import pareto_front
from tests.experiments.made_runs import make_run
from tests.experiments.reporting.pictures import axes_of, ends_of, legend_of, lines_of, made, right, runs  # noqa: F401


class TestAccuracyByBudget:
    def test_lines_hold_the_accuracies_and_intervals_end_where_they_do(self, runs):
        table = compare(runs).set_index("run")
        panels = axes_of(plots.accuracy_by_budget(runs))
        assert list(panels) == ["sums", "traces"]
        lines = lines_of(panels["sums"])
        assert lines["zipage"][1] == [25, 62.5]
        assert lines["random + prompt"][1] == [37.5, 30]
        assert np.round(lines["zipage"][0]).tolist() == [0, 1]
        assert [tick.get_text() for tick in panels["sums"].get_xticklabels()] == ["64", "128"]
        assert lines_of(panels["traces"])["zipage"][1] == [50]
        ends = ends_of(panels["sums"])
        for run in ("b-zip-64", "c-zip-128", "d-rnd-64", "e-rnd-128"):
            low, high = 100 * table.loc[run, ["accuracy.low", "accuracy.high"]].astype(float)
            assert (round(low, 6), round(high, 6)) in ends, run

    def test_bytes_stand_below_the_budgets(self, runs):
        runs["kv_bytes.mean"] = [9.0 * 2**20, 2.0 * 2**20, 4 * 2**20, 2.5 * 2**20, 4 * 2**20, 9 * 2**20, np.nan]
        panels = axes_of(plots.accuracy_by_budget(runs))
        assert [tick.get_text() for tick in panels["sums"].get_xticklabels()] == ["64\n2–2.5", "128\n4"]
        assert [tick.get_text() for tick in panels["traces"].get_xticklabels()] == ["64"]

    def test_full_kv_is_a_band(self, runs):
        axis = axes_of(plots.accuracy_by_budget(runs))["sums"]
        full = compare(runs).set_index("run").loc["a-full"]
        assert lines_of(axis)["full KV"][1] == [75, 75]
        assert [(p.get_y(), p.get_y() + p.get_height()) for p in axis.patches] == [
            pytest.approx((100 * full["accuracy.low"], 100 * full["accuracy.high"]))
        ]

    def test_full_kv_with_an_idle_budget_is_no_point(self, tmp_path):
        make_run(tmp_path, "a", budget=64)
        make_run(tmp_path, "b", "zipage", 128)
        axis = axes_of(plots.accuracy_by_budget(load_runs(tmp_path)))["sums"]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["128"]

    def test_seeds_are_points_with_a_line_through_their_mean(self, tmp_path):
        for seed, count in enumerate((10, 20)):
            make_run(tmp_path, f"s{seed}", "zipage", 64, grades=right(count), options={"seed": seed})
        make_run(tmp_path, "t", "zipage", 128, grades=right(30))
        axis = axes_of(plots.accuracy_by_budget(load_runs(tmp_path)))["sums"]
        assert lines_of(axis)["zipage"] == ([0, 1], [37.5, 75])
        assert len(ends_of(axis)) == 3

    def test_options_tell_lines_apart(self, tmp_path):
        for size in (16, 64):
            make_run(tmp_path, f"b{size}", "zipage", 64, options={"engine.block_size": size})
        axis = axes_of(plots.accuracy_by_budget(load_runs(tmp_path)))["sums"]
        assert set(lines_of(axis)) == {"zipage, block_size 16", "zipage, block_size 64"}

    def test_options_tell_lines_apart_at_whatever_budgets_they_ran(self, tmp_path):
        for budget, recent in ((64, 16), (128, 32)):
            make_run(tmp_path, f"b{budget}", "zipage", budget, options={"policy.recent_tokens": recent})
        axis = axes_of(plots.accuracy_by_budget(load_runs(tmp_path)))["sums"]
        assert set(lines_of(axis)) == {"zipage, recent_tokens 16", "zipage, recent_tokens 32"}

    def test_budgets_are_those_that_held(self, tmp_path):
        """272 to 512 are one budget in blocks of 256, and 100 is no budget of its own."""
        for number, budget in enumerate((272, 384, 512, 100)):
            make_run(tmp_path, f"b{budget}", "zipage", budget, grades=right(10 * number))
        runs = load_runs(tmp_path)
        runs["engine.block_size"] = 256
        axis = axes_of(plots.accuracy_by_budget(runs))["sums"]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["256", "512"]
        assert lines_of(axis)["zipage"] == ([0, 1], [75, 25])
        assert style.run_names(runs).tolist() == [
            "zipage, 256 (for 100)", "zipage, 512 (for 272)", "zipage, 512 (for 384)", "zipage, 512"
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "change",
        [
            ({"workload.options.distance": 64}, {}, "sums, distance 64"),
            ({"limit": 32}, {}, "sums, limit 32"),
            ({"workload.seed": 1}, {}, "sums, seed 1"),
            ({}, {"data": "d1"}, "sums, data d1"),
        ],
    )
    def test_other_problems_have_a_panel_of_their_own(self, tmp_path, change):
        options, origin, title = change
        for budget in (64, 128):
            make_run(tmp_path, f"a{budget}", "zipage", budget, grades=right(10))
        make_run(tmp_path, "full", grades=right(40))
        make_run(tmp_path, "b", "zipage", 256, grades=right(30), options=options, origin=origin)
        panels = axes_of(plots.accuracy_by_budget(load_runs(tmp_path)))
        mine = panels.pop(title)
        assert lines_of(mine) == {"zipage": ([0], [75])}, "and full KV of other problems is no band there"
        (others,) = panels.values()
        assert lines_of(others)["zipage"] == ([0, 1], [25, 25])
        assert "full KV" in lines_of(others)

    def test_many_policies_have_a_panel_each(self, tmp_path):
        make_run(tmp_path, "full", grades=right(30))
        policies = style.ORDER[:12]
        for policy in policies:
            for budget in (64, 128):
                for protection in ("none", "prompt"):
                    make_run(tmp_path, f"{policy}-{budget}-{protection}", policy, budget, protection)
        runs = load_runs(tmp_path)
        compared = compare(runs)
        figure = plots.accuracy_by_budget(runs, compared)
        panels = axes_of(figure)
        shown = [policy for policy in policies if policy != "random_attention"]
        assert list(panels) == [f"sums: {policy}" for policy in shown], "random + prompt is one policy, whoever ran it"
        assert legend_of(figure) == ["full KV", "no protection", "prompt"]
        for axis in panels.values():
            assert set(lines_of(axis)) == {"full KV", "no protection", "prompt"}
        figure.draw_without_rendering()
        assert all(axis.get_window_extent().height > 90 for axis in panels.values()), "no panel collapses"
        rows = axes_of(plots.accuracy_by_policy(runs, compared))
        assert list(rows) == ["sums, budget 64", "sums, budget 128"]
        plain = runs[runs["policy.protection"] == "none"]
        for draw in (plots.throughput_over_time, plots.latency_cdfs, plots.concurrency_over_time):
            figure = draw(plain)
            figure.draw_without_rendering()
            assert all(axis.get_window_extent().height > 90 for axis in figure.axes), draw.__name__


def test_accuracy_by_policy_names_what_differs(tmp_path):
    for recent in (16, 32):
        make_run(tmp_path, f"r{recent}", "zipage", 64, options={"policy.recent_tokens": recent})
    axis = axes_of(plots.accuracy_by_policy(load_runs(tmp_path)))["sums, budget 64"]
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "zipage, recent_tokens 16",
        "zipage, recent_tokens 32",
    ]


def test_accuracy_by_policy_has_a_point_a_run(runs):
    axis = axes_of(plots.accuracy_by_policy(runs))["sums, budget 64"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["zipage", "random"]
    points = {container.get_label(): container.lines[0] for container in axis.containers}
    assert points["no protection"].get_xdata().tolist() == [25]
    assert points["prompt"].get_xdata().tolist() == [37.5]
    assert points["prompt"].get_ydata().tolist() == [1]
    assert points["prompt"].get_markerfacecolor() != points["no protection"].get_markerfacecolor() == "white"


class TestAccuracyByThroughput:
    def test_points_are_the_runs(self, runs):
        rates = runs.set_index("run")["output_tokens_per_second"]
        lines = lines_of(axes_of(plots.accuracy_by_throughput(runs))["sums"])
        assert lines["zipage"] == ([rates["b-zip-64"], rates["c-zip-128"]], [25, 62.5])
        assert lines["full KV"] == ([rates["a-full"]], [75])

    def test_the_front_joins_what_nothing_beats(self, runs):
        axis = axes_of(plots.accuracy_by_throughput(runs))["sums"]
        joined = [line for line in axis.lines if line.get_linestyle() != "None"]
        fronts = [list(line.get_ydata()) for line in joined]
        assert fronts == [[62.5, 25]], "zipage: slow and right, fast and wrong; random + prompt: one run is both"

    def test_pareto_front(self):
        front = pareto_front(np.array([1.0, 2, 3, 3, 4]), np.array([0.9, 0.5, 0.7, 0.8, 0.1]))
        assert front.tolist() == [0, 3, 4]
        assert pareto_front(np.array([2.0, 1.0]), np.array([0.5, 0.5])).tolist() == [0]
