"""Runs are compared with the baselines they belong to, and with no others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import records
from experiments.analysis import baselines
from experiments.analysis.comparison import DERIVED, RECORDED, compare
from experiments.analysis.statistics import clustered_mean, non_inferiority, paired_difference
from experiments.records import load_requests, load_runs
from experiments.records.schemas import REQUEST_SCHEMA, write_rows
from experiments.reporting.tables import comparison_table

FULL, ZIPAGE = {"name": "full"}, {"name": "zipage", "budget_tokens": 512}
RANDOM = {"name": "random", "budget_tokens": 512, "protection": "prompt"}
GRADES = [1.0, 0.0, 1.0, 1.0] * 15
OF_AS_MANY_BYTES = [
    ({"control-a": 101.0, "control-b": 104.0}, "control-a"),
    ({"control-a": 104.0, "control-b": 100.0}, "control-b"),
    ({"control-a": 99.9, "control-b": 104.9}, "control-b"),
    ({"control-a": 99.9, "control-b": 105.1}, "control-a"),
    ({"control-a": 95.1, "control-b": 96.0}, "control-b"),
    ({"control-a": 94.9, "control-b": 105.1}, None),
    ({"control-a": 94.9, "control-b": None}, None),
]
"""The mean bytes of two controls, and the one that belongs to a run that holds 100.0."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values at dotted names replaced."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for name, value in changes.items():
        group, _, option = name.rpartition(".")
        (result[group] if group else result)[option] = value
    return result


def make_run(
    folder: Path,
    name: str,
    policy: dict[str, Any],
    grades: list[float | None] = GRADES,
    *,
    config: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    rows: dict[str, list] | None = None,
) -> None:
    """A run of two samples a problem; the keywords replace values, by dotted name, or columns of the samples."""
    options = {
        "model": {"name": "m", "load_format": "auto"},
        "engine": {"dtype": "auto", "block_size": 256, "tensor_parallel_size": 1},
        "policy": {"protection": "none", "budget_tokens": None, "trigger": "block_full", "recent_tokens": 16} | policy,
        "workload": {"name": "w", "grader": "number"},
        "sampling": {"temperature": 0.6, "stop": [], "policy": None, "budget_tokens": None},
        "hardware": {"device": "auto", "threads": None},
        "scenario": {"arrival": "all_at_once"},
        "backend": "zipage",
        "limit": 30,
        "seed": 0,
    }
    origin = {"data": "d0", "prompts": "p0", "ended": "2026-01-01", "hardware": {"gpus": ["H100"]}}
    figures = {"samples": len(grades), "errors": 0, "seconds": 10.0, "loop_rate": 0.25, "budget_bound_share": 1.0}
    figures |= {"finish_reasons": {"stop": len(grades)}, "output_length": {"mean": 100.0}, "ttft": {"p50": 0.5}}
    columns: dict[str, list] = {
        "prompt_id": [f"{i // 2:03d}" for i in range(len(grades))],
        "sample_index": [i % 2 for i in range(len(grades))],
        "grade": grades,
        "output_token_ids": [[i] * 100 for i in range(len(grades))],
        "ttft": [1.0] * len(grades),
        "tpot": [0.1] * len(grades),
    } | (rows or {})
    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path = folder / name
    path.mkdir(parents=True)
    records.write_config(path, merged(options, config or {}))
    records.write_json(path / records.PROVENANCE, merged(origin, provenance or {}))
    write_rows(path / records.REQUESTS, samples, REQUEST_SCHEMA)
    records.write_json(path / records.METRICS, merged(figures, metrics or {}))


def compared(folder: Path, **options: Any) -> pd.DataFrame:
    return compare(load_runs(folder), **options).set_index("run")


class TestTable:
    def test_one_row_a_run_with_the_numbers_of_each(self, tmp_path):
        random = np.random.default_rng(0)
        full, zipage, control = (random.binomial(1, p, 200).astype(float).tolist() for p in (0.7, 0.6, 0.65))
        make_run(tmp_path, "a-full", FULL, full)
        make_run(tmp_path, "b-zipage", ZIPAGE, zipage, metrics={"output_length": {"mean": 130.0}})
        make_run(tmp_path, "c-random", RANDOM, control)
        runs = load_runs(tmp_path)
        table = compare(runs, margin=0.05)
        assert table.index.equals(runs.index)
        assert list(table.columns) == [*RECORDED, *DERIVED]
        assert table["full.difference"].dtype == table["loop_rate"].dtype == float
        requests = [load_requests(run) for _, run in runs.iterrows()]
        row = table.iloc[1]
        alone = clustered_mean(zipage, requests[1]["prompt_id"])
        assert (row["accuracy"], row["accuracy.low"], row["accuracy.high"]) == (alone.value, alone.low, alone.high)
        assert (row["problems"], row["graded"], row["device"]) == (100, 200, "H100")
        for name, baseline in (("full", 0), ("random", 2)):
            expected = paired_difference(requests[1], requests[baseline])
            found = [row[f"{name}.{column}"] for column in ("difference", "low", "high")]
            assert found == pytest.approx([expected.value, expected.low, expected.high])
            assert row[f"{name}.verdict"] == non_inferiority(expected, 0.05)
            assert "100 problems can't carry a margin of 5.0%" in row[f"{name}.power_warning"]
        assert (row["full.run"], row["random.run"]) == ("a-full", "c-random")
        assert row["output_length.inflation"] == pytest.approx(1.3)
        assert table["full.run"].tolist()[2] == "a-full"
        assert table["random.run"].isna().tolist() == [True, False, True]
        assert table["full.run"].isna().tolist() == [True, False, False]

    def test_recorded_figures_are_taken_over(self, tmp_path):
        make_run(tmp_path, "a", ZIPAGE, metrics={"finish_reasons": {"stop": 44, "length": 14, "error": 2}, "errors": 2})
        row = compared(tmp_path).loc["a"]
        assert row["cap_hit_share"] == 14 / 58, "of the answered samples"
        assert (row["budget_bound_share"], row["ttft.p50"], row["loop_rate"]) == (1.0, 0.5, 0.25)

    def test_options_that_differ_are_columns(self, tmp_path):
        make_run(tmp_path, "a", ZIPAGE, config={"policy.options": {"window": 8}})
        make_run(tmp_path, "b", ZIPAGE, config={"engine.dtype": "float32"})
        make_run(tmp_path, "c", RANDOM | {"recent_tokens": 32}, config={"policy.options": {"other": 1}})
        make_run(tmp_path, "d", {"name": "full"}, config={"backend": "vllm"})
        make_run(tmp_path, "e", {"name": "full", "recent_tokens": 99, "trigger": "pressure"}, config={"limit": 20})
        table = compared(tmp_path)
        own = {"policy.options.window", "engine.dtype", "policy.recent_tokens", "backend", "limit"}
        assert own <= set(table)
        assert not {"policy.trigger", "policy.options.other", "engine.block_size", "sampling.temperature"} & set(table)
        assert table.loc["a", "policy.options.window"] == 8
        shown = comparison_table(table.reset_index())
        assert own <= set(shown)
        assert not shown.drop(columns="policy").duplicated().any()
        assert set(compared(tmp_path / "a")) == set(compare(load_runs(tmp_path / "a"))) - {"run"}
        assert not own & set(compared(tmp_path / "a"))

    def test_goodput_and_correct_answers_per_hour(self, tmp_path):
        late = {"ttft": [1.0] * 30 + [3.0] * 30, "tpot": [0.1] * 15 + [0.9] * 15 + [None] * 30}
        make_run(tmp_path, "a", FULL, [1.0] * 60, rows=late)
        make_run(tmp_path, "b", FULL, [0.5] * 60, rows=late, config={"engine.tensor_parallel_size": 2})
        table = compared(tmp_path)
        assert table["goodput"].tolist() == [6, 3]
        assert table["slo_goodput"].tolist() == [6, 3]
        assert table["correct_per_gpu_hour"].tolist() == [21600, 5400]
        assert compared(tmp_path, ttft=2.0)["slo_goodput"].tolist() == [3, 1.5]
        assert compared(tmp_path, tpot=0.5)["slo_goodput"].tolist() == [4.5, 2.25], "one token has no TPOT"
        assert compared(tmp_path, ttft=2.0, tpot=0.5)["slo_goodput"].tolist() == [1.5, 0.75]

    def test_loops_of_older_records_are_read_from_their_tokens(self, tmp_path):
        tokens = [[7] * 100] * 15 + [list(range(100))] * 43 + [[], []]
        errors = [None] * 58 + ["too long"] * 2
        make_run(tmp_path, "a", FULL, metrics={"loop_rate": None}, rows={"output_token_ids": tokens, "error": errors})
        make_run(tmp_path, "b", FULL, rows={"output_token_ids": tokens, "error": errors})
        assert compared(tmp_path)["loop_rate"].tolist() == pytest.approx([15 / 58, 0.25])

    def test_nothing_graded_is_null(self, tmp_path):
        make_run(tmp_path, "a", FULL, [None] * 20)
        make_run(tmp_path, "b", ZIPAGE, [None] * 20)
        table = compared(tmp_path)
        assert table.loc["b", "full.run"] == "a"
        assert table.loc["b", "output_length.inflation"] == 1
        graded = ["accuracy", "accuracy.low", "problems", "goodput", "correct_per_gpu_hour", "full.difference"]
        assert table[[*graded, "full.verdict"]].isna().all(axis=None)

    def test_partly_graded_problems(self, tmp_path):
        make_run(tmp_path, "a", FULL)
        make_run(tmp_path, "b", ZIPAGE, [None, *GRADES[1:]])
        make_run(tmp_path, "c", ZIPAGE, [None, None, *GRADES[2:]])
        table = compared(tmp_path)
        assert table["graded"].tolist() == [60, 59, 58]
        assert table["problems"].tolist() == [30, 30, 29]
        assert table["full.difference"].isna().tolist() == [True, False, True]

    def test_order_of_the_samples_does_not_matter(self, tmp_path):
        grades = np.random.default_rng(1).binomial(1, 0.5, 60).astype(float)
        shuffled = np.random.default_rng(2).permutation(60)
        make_run(tmp_path, "a", FULL)
        make_run(tmp_path, "b", ZIPAGE, grades.tolist())
        ids = {"prompt_id": [f"{i // 2:03d}" for i in shuffled]}
        make_run(tmp_path, "c", ZIPAGE, grades[shuffled].tolist(), rows=ids)
        table = compared(tmp_path).drop(columns=["path", "full.run"])
        pd.testing.assert_series_equal(table.loc["b"], table.loc["c"], check_names=False)

    def test_unreadable_samples_cost_a_line(self, tmp_path, caplog):
        make_run(tmp_path, "a", FULL)
        make_run(tmp_path, "b", ZIPAGE)
        runs = load_runs(tmp_path)
        (tmp_path / "b" / records.REQUESTS).write_text("half")
        with caplog.at_level(logging.WARNING):
            table = compare(runs).set_index("run")
        assert table["accuracy"].isna().tolist() == [False, True]
        assert "b: its samples can't be read" in caplog.text

    def test_no_runs_give_an_empty_table(self, tmp_path):
        table = compare(load_runs(tmp_path))
        assert table.empty
        assert list(table.columns) == [*RECORDED, *DERIVED]

    def test_negative_margin_is_refused(self, tmp_path):
        make_run(tmp_path, "a", FULL)
        with pytest.raises(ValueError, match=r"margin=-0\.02"):
            compared(tmp_path, margin=-0.02)


class TestBaselines:
    @pytest.mark.parametrize(
        "change",
        [
            {"config": {"model.name": "other"}},
            {"config": {"model.chat_template": "none"}},
            {"config": {"sampling.temperature": 0.0}},
            {"config": {"sampling.stop": ["x"]}},
            {"config": {"limit": None}},
            {"config": {"seed": 1}},
            {"config": {"engine.dtype": "float32"}},
            {"config": {"workload.grader": "math"}},
            {"config": {"hardware.device": "cpu"}},
            {"provenance": {"data": "d1"}},
            {"provenance": {"prompts": "p1"}},
            {"provenance": {"model_files": {"weights": "w1"}}},
            {"provenance": {"hardware": {"gpus": ["H200"]}}},
            {"provenance": {"sources": {"engine": "edited"}}},
            {"provenance": {"sources": {"grader": "edited"}}},
        ],
    )
    def test_what_must_match(self, tmp_path, change):
        make_run(tmp_path, "a", FULL)
        make_run(tmp_path, "b", RANDOM)
        make_run(tmp_path, "same", ZIPAGE)
        make_run(tmp_path, "x", ZIPAGE, **change)
        table = compared(tmp_path)
        assert table.loc["same", ["full.run", "random.run"]].tolist() == ["a", "b"]
        assert table.loc["x", ["full.run", "random.run", "full.difference", "output_length.inflation"]].isna().all()

    def test_a_model_is_its_content_whatever_its_file_is_called(self, tmp_path):
        make_run(tmp_path, "a", FULL, provenance={"model_files": {"a.gguf": "w1"}})
        make_run(tmp_path, "b", ZIPAGE, provenance={"model_files": {"b.gguf": "w1"}})
        assert compared(tmp_path).loc["b", "full.run"] == "a"

    def test_a_missing_option_is_one_without_value(self, tmp_path):
        make_run(tmp_path, "a", FULL, config={"sampling.seed": None})
        make_run(tmp_path, "b", ZIPAGE)
        assert compared(tmp_path).loc["b", "full.run"] == "a"

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"policy": RANDOM | {"name": "random_attention"}}, True),
            ({"policy": RANDOM | {"protection": "none"}}, False),
            ({"policy": RANDOM | {"protection": "sink:4"}}, False),
            ({"policy": RANDOM | {"budget_tokens": 1024}}, False),
            ({"policy": RANDOM | {"trigger": "pressure"}}, False),
            ({"policy": RANDOM, "config": {"engine.block_size": 16}}, False),
            ({"policy": RANDOM | {"interval": 512}}, False),
            ({"policy": RANDOM | {"interval": 200}}, True),
            ({"policy": RANDOM | {"scheduling": "constrained"}}, True),
        ],
    )
    def test_random_control(self, tmp_path, change, found):
        make_run(tmp_path, "control", **change)
        make_run(tmp_path, "run", ZIPAGE)
        controls = compared(tmp_path)["random.run"]
        assert controls.isna().to_dict() == {"control": True, "run": not found}
        assert controls.dropna().tolist() == ["control"] * found

    @pytest.mark.parametrize(("held", "found"), OF_AS_MANY_BYTES)
    def test_random_control_of_as_many_bytes(self, tmp_path, held, found):
        """Within 5 %, whatever its budget: the fewest that are no fewer, or else the most."""
        for budget, (name, mean) in enumerate(held.items(), 600):
            metrics = {"kv_bytes": None if mean is None else {"mean": mean}}
            make_run(tmp_path, name, RANDOM | {"budget_tokens": budget}, metrics=metrics)
        make_run(tmp_path, "other", RANDOM, metrics={"kv_bytes": {"mean": 100.0}}, config={"engine.block_size": 16})
        make_run(tmp_path, "bare", RANDOM | {"protection": "none"}, metrics={"kv_bytes": {"mean": 100.0}})
        make_run(tmp_path, "run", ZIPAGE, [1.0] * 60, metrics={"kv_bytes": {"mean": 100.0}})
        table = compared(tmp_path)
        assert table["random.run"].isna().all(), "none of the same budget in blocks of the same size"
        assert table["bytes.run"].dropna().to_dict() == ({"run": found, "bare": found} if found else {})
        assert pd.isna(table.loc["run", "bytes.difference"]) == (found is None)

    def test_budgets_are_equal_where_they_held_as_many_entries(self, tmp_path):
        make_run(tmp_path, "control", RANDOM | {"budget_tokens": 300})
        make_run(tmp_path, "run", ZIPAGE)
        make_run(tmp_path, "full", {"name": "full", "budget_tokens": 100})
        table = compared(tmp_path)
        assert table.loc["run", "random.run"] == "control"
        assert table["budget"].fillna(0).to_dict() == {"control": 512, "run": 512, "full": 0}

    def test_policy_and_budget_of_the_requests_count(self, tmp_path):
        make_run(tmp_path, "a", ZIPAGE, config={"sampling.policy": "full"})
        make_run(tmp_path, "b", ZIPAGE)
        make_run(tmp_path, "c", RANDOM | {"budget_tokens": 64}, config={"sampling.budget_tokens": 512})
        make_run(tmp_path, "d", RANDOM, config={"sampling.budget_tokens": 64})
        table = compared(tmp_path)
        assert table.loc["b", ["full.run", "random.run"]].tolist() == ["a", "c"]

    def test_full_kvs_answers_fed_to_a_policy_are_no_baseline_of_free_ones(self, tmp_path):
        fed = {"scenario.kind": "fidelity", "scenario.name": "fidelity"}
        older = {"code.commit": "a", "code.diff": "1", "code.version": "1"}
        newer = {"code.commit": "b", "code.diff": "2", "code.version": "2"}
        make_run(tmp_path, "free", FULL, provenance={"code": older})
        make_run(tmp_path, "fed", FULL, [None] * len(GRADES), config=fed, provenance={"code": newer})
        make_run(tmp_path, "y", ZIPAGE, provenance={"code": newer}, config={"scenario.kind": "serve"})
        make_run(tmp_path, "z", ZIPAGE, [None] * len(GRADES), config=fed, provenance={"code": older})
        assert compared(tmp_path).loc[["y", "z"], "full.run"].tolist() == ["free", "fed"]

    def test_the_nearest_then_the_latest(self, tmp_path):
        make_run(tmp_path, "near", FULL, config={"engine.block_size": 16})
        make_run(tmp_path, "old", FULL)
        make_run(tmp_path, "new", FULL, provenance={"ended": "2026-02-01"})
        make_run(tmp_path, "older", FULL)
        make_run(tmp_path, "x", ZIPAGE, config={"engine.block_size": 16})
        make_run(tmp_path, "y", ZIPAGE)
        table = compared(tmp_path)
        assert table.loc[["x", "y"], "full.run"].tolist() == ["near", "new"]

    def test_devices(self):
        options = [("cpu", ["A"]), ("auto", []), ("auto", ["A", "B"]), ("cuda:1", ["A", "B"]), ("cuda", ["A", "B"])]
        runs = pd.DataFrame(options, columns=["hardware.device", "provenance.hardware.gpus"])
        assert baselines.devices(runs) == ["cpu", "cpu", "A", "B", "A"]
