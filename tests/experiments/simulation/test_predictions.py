"""Committed records against their simulation, and a fit to one record that predicts another."""

import json
import shutil
from dataclasses import replace

import pytest

from experiments import simulate
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import ROWS
from experiments.simulation import fit
from experiments.simulation.aims import aims_table, figure
from experiments.simulation.arms import measured_arms
from experiments.simulation.arms import simulate_arm as simulate_anew
from experiments.simulation.errors import compared, error_table, load_table, machine_of_record
from experiments.simulation.fit import (
    DEVICE,
    block_constant,
    device_constants,
    few_rows_constants,
    kernel_shares,
    launch_constant,
    product_constant,
    request_constant,
    sum_constants,
)
from experiments.simulation.machine import read_machine

RECORDS = ROOT / "results" / "records"
TWO = ("ranks_h100/two_h100", "two"), ("short_ranks_h100/two_zipage_short", "two_zipage")
FOUR = ("ranks_h100/four_h100", "four"), ("short_ranks_h100/four_zipage_short", "zipage")


@pytest.fixture(autouse=True)
def _each_arm_is_simulated_once(monkeypatch):
    monkeypatch.setattr(fit, "simulate_arm", simulate_arm)


def simulate_arm(arm, machine):
    """Fits try what is asked for afterwards, and a machine simulates equal arms equally."""
    if (found := SIMULATED.get(key := (repr(arm), machine))) is None:
        found = SIMULATED[key] = simulate_anew(arm, machine)
    return found


SIMULATED = {}


def arm_of(record: str, name: str):
    return next(measured for measured in measured_arms(RECORDS / record) if measured.arm.name == name)


def test_a_fit_to_one_record_predicts_another():
    """From first guesses that are wrong by a fifth."""
    machine = read_machine("h100")
    wrong = replace(machine, **{name: 0.8 * getattr(machine, name) for name in DEVICE})
    wrong = kernel_shares(wrong, RECORDS / "kernels_scenario_h100")
    known = arm_of("engine_bench_factorial_h100", "random_async")
    known = replace(known, arm=replace(known.arm, repeats=2))
    fitted = device_constants(wrong, RECORDS / "profile_step_h100.json", [known])
    other = arm_of("engine_bench_short_h100", "zipage")
    measured = other.row["tokens_per_second"]
    assert simulate_arm(other.arm, wrong).row["tokens_per_second"] / measured < 0.95
    assert simulate_arm(other.arm, fitted).row["tokens_per_second"] == pytest.approx(measured, rel=0.03)


def test_what_few_rows_change_predicts_other_loads():
    """Fitted to one request alone; a mixed load is predicted."""
    machine = replace(read_machine("h200"), overlap_seconds=0.0)
    arms = [arm_of("engine_bench_alone_h200", "full")]
    fitted = few_rows_constants(machine, RECORDS / "profile_step_after_h200.json", arms)
    for record, name, before in (("mixed", "zipage_512", -0.04), ("alone", "full", -0.12)):
        other = arm_of(f"engine_bench_{record}_h200", name)
        without, found = (
            simulate_arm(other.arm, on).row["tokens_per_second"] / other.row["tokens_per_second"] - 1
            for on in (machine, fitted)
        )
        assert abs(found) < 0.03
        assert without < before


def test_small_blocks_of_one_gpu_predict_those_of_another():
    """Fitted to an H100; on an H200 a trace in blocks of 16 comes out too fast without."""
    fitted = block_constant(read_machine("h100_before_graphs"), arm_of("engine_bench_short_h100", "full"))
    other = arm_of("engine_bench_trace_h200", "full")
    without, found = (
        simulate_arm(other.arm, replace(read_machine("h200"), block_entries=entries)).row["tokens_per_second"]
        / other.row["tokens_per_second"]
        for entries in (0.0, fitted.block_entries)
    )
    assert found - 1 < 0.03 < 0.045 < without - 1


def test_a_mixture_of_experts_is_predicted_by_what_dense_models_were_fitted_to():
    for name in ("full", "zipage"):
        arm = arm_of("engine_bench_experts_qwen_h200", name)
        row = simulate_arm(arm.arm, read_machine("h200")).row
        assert row["tokens_per_second"] == pytest.approx(arm.row["tokens_per_second"], rel=0.05)
        assert row["step_ms"]["p50"] == pytest.approx(arm.row["step_ms"]["p50"], rel=0.02)


def test_records_are_simulated_as_the_engine_was_then():
    for record, name in (
        ("engine_bench_alone_h200", "h200"),
        ("serve_trace_h200/full_lent_h200", "h200_before"),
        ("engine_bench_ranks_h200/one_gpu", "h200_before_graphs"),
        ("serve_trace_lent_h100/full_lent", "h100"),
        ("engine_bench_policies_h100", "h100_before_graphs"),
    ):
        assert machine_of_record(RECORDS / record) == read_machine(name)


def test_graphs_that_a_first_repeat_captures():
    """Launches are fitted to an arm that was timed once. Others of that load are predicted, and by how much a first
    repeat is slower than the third on another machine.
    """
    machine = replace(read_machine("h100_before_graphs"), launch_seconds=1e-4)
    once = arm_of("engine_bench_redesign_h100/after_small1", "full")
    fitted = launch_constant(machine, once)
    assert simulate_arm(once.arm, machine).row["tokens_per_second"] / once.row["tokens_per_second"] > 1.08
    for name in ("full", "zipage"):
        other = arm_of("engine_bench_redesign_h100/after_small2", name)
        assert simulate_arm(other.arm, fitted).row["tokens_per_second"] == pytest.approx(
            other.row["tokens_per_second"], rel=0.03
        )
    other = arm_of("engine_bench_small_h200", "full")
    first, _, third = other.row["repeats"]
    on = replace(read_machine("h200"), launch_seconds=fitted.launch_seconds)
    predicted = simulate_arm(other.arm, on).row["repeats"]
    assert predicted[0] / predicted[2] == pytest.approx(first / third, abs=0.03)


def test_two_gpus_predict_four():
    """What a product takes beside its bytes is read off a profile; without it four GPUs come out too fast."""
    few, many = (arm_of(f"engine_bench_{name}", arm) for name, arm in TWO)
    fitted = product_constant(read_machine("h100"), RECORDS / "ranks_profile_h200.json")
    assert 3e-6 < fitted.product_seconds < 4e-6
    fitted = sum_constants(fitted, [few, many])
    for name, arm in FOUR:
        other = arm_of(f"engine_bench_{name}", arm)
        off = simulate_arm(other.arm, fitted).row["tokens_per_second"] / other.row["tokens_per_second"] - 1
        assert abs(off) < 0.03


def test_the_constant_of_requests_predicts_the_median_ttft_of_another_record():
    """Of rows that are committed: the trace that was served is no part of the project."""
    content = json.loads((RECORDS / "simulated_errors.json").read_text())
    rows = [row for row in content["served"] if row["refused"] is None]
    machine = read_machine("h100")
    fitted = request_constant(machine, [row for row in rows if row["record"] == "serve_trace_four_h100"])
    assert fitted.request_seconds == pytest.approx(machine.request_seconds, rel=0.1)
    others = [row["ttft.p50"] for row in rows if row["record"] == "serve_trace_lent_h100"]
    off = [abs(median["off"]) for median in others]
    without = [1 - (median["simulated"] - machine.request_seconds) / median["measured"] for median in others]
    assert max(off) < 0.18
    assert min(without) > 0.15
    assert sum(value < 0.1 for value in off) >= 4


def test_errors_are_told_beside_what_was_measured():
    rows = list(compared(RECORDS / "engine_bench_short_256_h100", read_machine("h100")))
    (row,) = rows
    assert row["compressions"] == figure(1280, 1280)
    assert abs(row["tokens_per_second"]["off"]) < 0.05
    assert "short_256_h100" in error_table(rows)
    assert "| short | 1    | 1    |" in load_table(rows)
    assert "| compressions | 2%  | 1 of 1, 0.0%, 0.0% " in aims_table({"engine_bench": rows})


def test_what_is_fitted_reaches_no_aim():
    row = {"refused": None, "fitted": False, "steps": figure(100, 101), "pauses": figure(0, 3)}
    refused = {"refused": "no memory", "fitted": False}
    other = row | {"steps": figure(100, 97), "pauses": figure(0, 0)}
    text = aims_table({"a": [row, row | {"fitted": True}, refused, other], "b": [refused]})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == ["figure", "aim", "a: reached, median, most"]
    assert lines[2:] == [
        ["steps", "2%", "1 of 2, 2.0%, 3.0%"],
        ["pauses", "2%", "1 of 2, some for none, some for none"],
    ]


def test_a_folder_without_benchmarks_is_refused(tmp_path, capsys):
    assert simulate.main([str(tmp_path)]) == 2
    assert "no record of a benchmark" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no record of scenario=engine_bench"):
        measured_arms(RECORDS / "kernels_scenario_h100")


@pytest.mark.parametrize("rows", ["[]", '{"refused": null}'])
def test_a_record_whose_rows_are_not_those_of_its_arms_is_refused(tmp_path, rows):
    shutil.copytree(RECORDS / "engine_bench_ample_h200", tmp_path / "record")
    (tmp_path / "record" / ROWS).write_text(rows)
    with pytest.raises(UsageError, match="record: no record of scenario=engine_bench"):
        measured_arms(tmp_path / "record")
