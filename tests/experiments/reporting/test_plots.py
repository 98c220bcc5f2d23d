"""Pictures other than those of accuracy show the numbers of the runs, and all say what the runs lack."""

# ruff: noqa: F811

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.analysis.statistics import clustered_mean
from experiments.records import load_events, load_requests, load_runs, load_steps
from experiments.reporting import plots
from experiments.reporting.plots import style
from experiments.reporting.plots.answers import known_by_distance
from experiments.reporting.plots.maps import against_full, survival
from experiments.reporting.plots.timeline import decoding_rate
from tests.experiments.made_runs import make_run
from tests.experiments.reporting.pictures import LOAD, POOL, axes_of, lines_of, made, right, runs  # noqa: F401


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

    def test_replicas_add_up(self, tmp_path):
        """Two that do the same, one a quarter of a second after the other."""

        def rows(replica: int, late: float) -> list[dict]:
            counts = {"step_time": 1.0, "num_decode": 7, "num_waiting": 0, "replica": replica}
            return [
                counts | {"time": i + 1.0 + late, "num_running": i + 1, "blocks_used": 5 * i, "blocks_total": 50}
                for i in range(9)
            ]

        mixed = sorted(rows(0, 0.0) + rows(1, 0.25), key=lambda row: row["time"])
        make_run(tmp_path, "a", steps=mixed)
        runs = load_runs(tmp_path)
        (running,) = plots.concurrency_over_time(runs).axes
        assert lines_of(running)["full KV"][1] == list(range(1, 19))
        (blocks,) = plots.blocks_over_time(runs).axes
        assert lines_of(blocks)["full KV"][1] == [0.0, 0.0, *(5.0 * i for i in range(1, 17))]
        (rates,) = plots.throughput_over_time(runs).axes
        middles, rate = lines_of(rates)["full KV"]
        assert sum(rate) * (middles[1] - middles[0]) == pytest.approx(2 * 9 * 7)
        assert max(rate) <= 14 + 1e-9

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
        assert survival([np.array([[[0, 2], [1, -1]]])], 3).tolist() == [[[1, 0, 1], [0, 1, 0]]]

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
