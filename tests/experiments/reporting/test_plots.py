"""Pictures show the numbers of the runs, say what the runs lack, and hold many policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.analysis.comparison import compare
from experiments.analysis.statistics import clustered_mean
from experiments.records import load_events, load_requests, load_runs, load_steps
from experiments.reporting import plots
from experiments.reporting.plots import style
from experiments.reporting.plots.accuracy import pareto_front
from experiments.reporting.plots.answers import known_by_distance
from experiments.reporting.plots.maps import against_full, survival
from experiments.reporting.plots.timeline import decoding_rate
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
        runs["kv_bytes.max"] = [9.0 * 2**20, 2.0 * 2**20, 4 * 2**20, 2.5 * 2**20, 4 * 2**20, 9 * 2**20, np.nan]
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
        for policy in style.ORDER:
            for budget in (64, 128):
                for protection in ("none", "prompt"):
                    make_run(tmp_path, f"{policy}-{budget}-{protection}", policy, budget, protection)
        runs = load_runs(tmp_path)
        compared = compare(runs)
        figure = plots.accuracy_by_budget(runs, compared)
        panels = axes_of(figure)
        shown = [policy for policy in style.ORDER if policy != "random_attention"]
        assert list(panels) == [f"sums: {policy}" for policy in shown], "random + prompt is one policy, whoever ran it"
        assert legend_of(figure) == ["full KV", "no protection", "prompt"]
        for axis in panels.values():
            assert set(lines_of(axis)) == {"full KV", "no protection", "prompt"}
        figure.draw_without_rendering()
        assert all(axis.get_window_extent().height > 90 for axis in panels.values()), "no panel collapses"
        rows = axes_of(plots.accuracy_by_policy(runs, compared))
        assert list(rows) == ["sums, budget 64", "sums, budget 128"]
        for draw in (plots.throughput_over_time, plots.latency_cdfs, plots.concurrency_over_time):
            figure = draw(runs)
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


class TestOverTime:
    def test_rate_counts_every_token_once(self):
        steps = pd.DataFrame({"time": [0.5, 1.0, 4.0], "step_time": [0.5, 0.5, 1.0], "num_decode": [10, 20, 6]})
        middles, rate = decoding_rate(steps)
        assert middles.tolist() == [1, 3]
        assert rate.tolist() == [15, 3], "30 tokens in the first two seconds, 6 in the next"

    def test_lines_follow_the_steps(self, tmp_path):
        rows = [
            {
                "time": i + 1.0,
                "step_time": 1.0,
                "num_decode": 7,
                "num_running": i,
                "num_waiting": 9 - i,
                "blocks_used": 5 * i,
            }
            for i in range(10)
        ]
        make_run(tmp_path, "a", steps=rows)
        make_run(tmp_path, "b", "zipage", 64, steps=rows[:4])
        runs = load_runs(tmp_path)
        running, waiting = plots.concurrency_over_time(runs).axes
        assert lines_of(running)["full KV"] == (list(range(1, 11)), list(range(10)))
        assert lines_of(waiting)["zipage, 64"] == ([1, 2, 3, 4], [9, 8, 7, 6])
        (blocks,) = plots.blocks_over_time(runs).axes
        assert lines_of(blocks)["full KV"][1] == [5.0 * i for i in range(10)], "of 100 blocks"
        (rates,) = plots.throughput_over_time(runs).axes
        assert lines_of(rates)["full KV"][1] == pytest.approx([7, 7])
        assert rates.get_xlabel() == "seconds"

    def test_long_runs_are_thinned_and_keep_their_ends(self, tmp_path):
        make_run(tmp_path, "a", steps=[{"time": 0.1 * i, "num_running": i} for i in range(3000)])
        runs = load_runs(tmp_path)
        times, running = lines_of(plots.concurrency_over_time(runs).axes[0])["full KV"]
        assert len(times) < 600
        assert (running[0], running[-1]) == (0, 2999)
        assert set(running) <= set(load_steps(runs.iloc[0])["num_running"])

    def test_runs_without_steps_are_left_out(self, tmp_path):
        make_run(tmp_path, "a")
        (make_run(tmp_path, "b", "zipage", 64) / "steps.parquet").unlink()
        assert set(lines_of(plots.blocks_over_time(load_runs(tmp_path)).axes[0])) == {"full KV"}


def test_latencies_are_distributions(runs):
    figure = plots.latency_cdfs(runs)
    assert [axis.get_xlabel() for axis in figure.axes[:3]] == [
        "time to first token (s)",
        "time per output token (ms)",
        "end to end (s)",
    ]
    assert len(figure.axes) == 6, "a row for each workload"
    times, shares = lines_of(figure.axes[1])["zipage, 64"]
    requests = load_requests(runs.iloc[1])
    assert times == pytest.approx(sorted(1000 * requests["tpot"]))
    assert shares == pytest.approx([100 * (i + 1) / 40 for i in range(40)])


class TestLengthInflation:
    def test_ratios_are_paired_by_problem(self, tmp_path):
        make_run(tmp_path, "a", lengths=[100, 200, 400, 800], grades=right(2, 4))
        make_run(tmp_path, "b", "zipage", 64, lengths=[200, 200, 200, 1600], grades=right(2, 4))
        make_run(tmp_path, "c", "random", 64, lengths=[50, 100, 200, 400], grades=right(2, 4))
        (axis,) = plots.length_inflation(load_runs(tmp_path)).axes
        assert [tick.get_text() for tick in axis.get_yticklabels()] == ["zipage, 64", "random, 64"]
        medians = [list(line.get_xdata()) for line in axis.lines if line.get_color() == "black"]
        assert [1.5, 1.5] in medians, "of 2, 1, 0.5 and 2"
        assert [0.5, 0.5] in medians

    def test_without_full_kv_there_is_nothing_to_compare(self, tmp_path):
        make_run(tmp_path, "b", "zipage", 64)
        with pytest.raises(ValueError, match=r"^the runs hold no evicting run with full KV beside it$"):
            plots.length_inflation(load_runs(tmp_path))


class TestFactsByDistance:
    def test_points_are_shares_with_intervals_over_problems(self, tmp_path):
        facts = [([10, 100], [True, i % 2 == 0]) for i in range(20)]
        make_run(tmp_path, "a", facts=[([10, 100], [True, True])] * 20)
        make_run(tmp_path, "b", "zipage", 64, facts=facts)
        runs = load_runs(tmp_path)
        centres, known = known_by_distance(load_requests(runs.iloc[1]), bins=2)
        assert centres == [10, 100]
        assert [k.value for k in known] == [1, 0.5]
        alone = clustered_mean([float(i % 2 == 0) for i in range(20)], range(20))
        assert (known[1].low, known[1].high) == (alone.low, alone.high)
        axis = axes_of(plots.facts_by_distance(runs))["sums, budget 64"]
        drawn = {container.get_label(): container.lines[0].get_ydata() for container in axis.containers}
        assert set(drawn) == {"full KV", "zipage"}
        assert drawn["full KV"].tolist() == [100] * 4
        assert drawn["zipage"].mean() == pytest.approx(75)

    def test_answers_without_facts_do_not_count(self, tmp_path):
        make_run(tmp_path, "a", "zipage", 64, facts=[([10], [True]), None] * 10)
        _, known = known_by_distance(load_requests(load_runs(tmp_path).iloc[0]).dropna(subset="fact_distances"), 1)
        assert known[0].samples == 10


class TestCrossoverMap:
    @pytest.fixture
    def grid(self, tmp_path) -> pd.DataFrame:
        for load in (8, 32):
            for pool in (100, 400):
                options = {LOAD: load, POOL: pool}
                make_run(tmp_path, f"f{load}-{pool}", grades=right(20), seconds=load, options=options)
                if (load, pool) != (32, 400):
                    make_run(
                        tmp_path, f"z{load}-{pool}", "zipage", 64, grades=right(10), seconds=pool / 50, options=options
                    )  # fmt: skip
        return load_runs(tmp_path)

    def test_cells_are_ratios_and_missing_ones_are_said(self, grid):
        figure = plots.crossover_map(grid)
        axis = axes_of(figure)["zipage"]
        values = axis.images[0].get_array()
        assert values.filled(-1).tolist() == pytest.approx(np.array([[4, 1], [16, -1]]))
        assert [text.get_text() for text in axis.texts] == ["4.00", "1.00", "16.00", "not run"]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["100", "400"]
        assert [tick.get_text() for tick in axis.get_yticklabels()] == ["8", "32"]

    def test_colours_are_centred_on_equality(self, grid):
        norm = axes_of(plots.crossover_map(grid))["zipage"].images[0].norm
        assert norm(1.0) == pytest.approx(0.5)
        assert norm(4.0) == pytest.approx(1 - norm(0.25)), "four times is as far as a quarter"

    def test_accuracies_are_differences_in_points(self, grid):
        figure = plots.crossover_map(grid, value="accuracy")
        axis = axes_of(figure)["zipage"]
        assert axis.images[0].get_array().filled(0).tolist() == pytest.approx(np.array([[-25, -25], [-25, 0]]))
        assert axis.images[0].norm(0) == pytest.approx(0.5)
        assert "-25.0" in [text.get_text() for text in axis.texts]

    def test_options_are_not_averaged(self, tmp_path):
        for size in (8, 16):
            make_run(tmp_path, f"full{size}", options={LOAD: size, POOL: 100}, seconds=4)
            for number, scheduling in enumerate(("hybrid", "constrained"), 1):
                options = {LOAD: size, POOL: 100, "policy.scheduling": scheduling}
                make_run(tmp_path, f"{scheduling}{size}", "zipage", 64, options=options, seconds=number)
        found = against_full(load_runs(tmp_path))
        ratios = {name: grid.to_numpy().ravel().tolist() for name, grid in found.items()}
        assert ratios == {"zipage, scheduling hybrid": [4, 4], "zipage, scheduling constrained": [2, 2]}

    def test_budgets_and_workloads_are_not_averaged(self, grid, tmp_path):
        more = tmp_path / "more"
        for pool in (100, 400):
            make_run(more, f"z{pool}", "zipage", 128, seconds=2, options={LOAD: 8, POOL: pool})
            for policy in ("full", "zipage"):
                make_run(more, f"w{policy}{pool}", policy, 64, options={LOAD: 8, POOL: pool, "workload.name": "other"})
        assert list(against_full(pd.concat([grid, load_runs(more)], ignore_index=True))) == [
            "other: zipage, 64",
            "sums: zipage, 64",
            "sums: zipage, 128",
        ]

    def test_panels_share_one_scale(self, grid, tmp_path):
        make_run(tmp_path / "r", "a", "random", 64, grades=right(9), seconds=1, options={LOAD: 8, POOL: 100})
        make_run(tmp_path / "r", "b", "random", 64, grades=right(9), seconds=1, options={LOAD: 32, POOL: 100})
        figure = plots.crossover_map(pd.concat([grid, load_runs(tmp_path / "r")], ignore_index=True))
        scales = {image.norm.vmax for axis in figure.axes for image in axis.images}
        assert scales == {32.0}


class TestKeptPositions:
    KEPT = (np.array([[[0, 1, 4]], [[0, 2, 3]]]), np.array([[[0, 4, 6]], [[2, 3, 6]]]))

    def test_image_counts_the_compressions_survived(self, tmp_path):
        events = [{"round": i, "num_tokens": 5 + 2 * i, "kept_positions": kept} for i, kept in enumerate(self.KEPT)]
        run = make_run(tmp_path, "a", "zipage", 64, events=[*events, {"kind": "pause"}])
        figure = plots.kept_positions(load_events(run), "p000")
        image = figure.axes[0].images[0].get_array()
        assert image.tolist() == [[2, 1, 0, 0, 2, 0, 1], [1, 0, 2, 2, 0, 0, 1]]
        assert figure.axes[0].get_xlabel() == "token position"

    def test_survival(self):
        assert survival([self.KEPT[0]], 6).tolist() == [[[1, 1, 0, 0, 1, 0]], [[1, 0, 1, 1, 0, 0]]]

    def test_untraced_samples_are_an_error(self, tmp_path):
        run = make_run(tmp_path, "a", "zipage", 64, events=[{"round": 0, "num_tokens": 5}])
        with pytest.raises(ValueError, match=r"no compression of p000 with positions .*trace_positions=true"):
            plots.kept_positions(load_events(run), "p000")


class TestWhatRunsLack:
    DRAWN = (
        plots.accuracy_by_budget,
        plots.accuracy_by_policy,
        plots.accuracy_by_throughput,
        plots.blocks_over_time,
        plots.concurrency_over_time,
        plots.crossover_map,
        plots.facts_by_distance,
        plots.latency_cdfs,
        plots.length_inflation,
        plots.throughput_over_time,
    )

    @pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
    def test_no_runs(self, draw, tmp_path):
        make_run(tmp_path, "a")
        with pytest.raises(ValueError, match=r"^the runs hold no [^\n]+$"):
            draw(load_runs(tmp_path).iloc[:0])

    @pytest.mark.parametrize(
        ("draw", "what"),
        [
            (plots.accuracy_by_budget, "graded run under a budget"),
            (plots.accuracy_by_policy, "graded run under a budget"),
            (plots.length_inflation, "evicting run with full KV beside it"),
            (plots.facts_by_distance, "run whose problems name facts"),
            (plots.crossover_map, "values of engine.num_blocks"),
        ],
    )
    def test_full_kv_alone(self, draw, what, tmp_path):
        make_run(tmp_path, "a")
        with pytest.raises(ValueError, match=f"^the runs hold no {what}$"):
            draw(load_runs(tmp_path))

    def test_nothing_graded(self, tmp_path):
        make_run(tmp_path, "a", grades=[None] * 4)
        make_run(tmp_path, "b", "zipage", 64, grades=[None] * 4)
        for draw in (plots.accuracy_by_budget, plots.accuracy_by_throughput):
            with pytest.raises(ValueError, match=r"^the runs hold no graded run$"):
                draw(load_runs(tmp_path))


class TestStyle:
    def test_policies_are_told_apart_with_and_without_colours(self):
        looks = [style.look(name) for name in style.ORDER]
        assert len({(look["color"], look["marker"]) for look in looks}) == len(looks)
        first = looks[: len(style.COLOURS)]
        assert len({look["color"] for look in first}) == len({look["marker"] for look in first}) == len(first)

    def test_protection_keeps_the_colour_and_changes_line_and_marker(self):
        plain, protected = style.look("h2o"), style.look("h2o + prompt")
        assert plain["color"] == protected["color"]
        assert plain["linestyle"] != protected["linestyle"]
        assert plain["markerfacecolor"] != protected["markerfacecolor"]

    def test_greater_budgets_are_darker(self, runs):
        sums = runs[runs["workload.name"] == "sums"]
        looks = dict(zip(sums["run"], style.line_looks(sums), strict=True))
        assert looks["b-zip-64"]["alpha"] < looks["c-zip-128"]["alpha"] == 1
        assert looks["a-full"]["alpha"] == 1


def test_lines_of_one_policy_are_told_apart_without_shades(tmp_path):
    for budget in range(64, 64 + 16 * 8, 16):
        make_run(tmp_path, f"b{budget}", "zipage", budget, "prompt")
        make_run(tmp_path, f"f{budget}", options={"engine.num_blocks": budget})
    looks = style.line_looks(load_runs(tmp_path))
    seen = [(look["color"], look["marker"], look["linestyle"]) for look in looks]
    assert len(set(seen)) == len(seen) == 16


def test_pictures_with_nothing_to_show_are_left_out(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", "zipage", 64)
    runs = load_runs(tmp_path)
    with pytest.raises(ValueError, match="answer that is longer or shorter"):
        plots.length_inflation(runs)
    assert [axis.get_ylabel() for axis in plots.concurrency_over_time(runs).axes] == ["running requests"]
