"""Loads of `scenario=serve_bench` on a simulated server."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from experiments import simulate
from experiments.backends import BACKENDS
from experiments.bench.serve import served_arms
from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.records import content_hash, read_config, write_config
from experiments.running.models import find_model
from experiments.simulation import fit
from experiments.simulation.fit import request_constant
from experiments.simulation.machine import read_machine
from experiments.simulation.serve_command import given_options
from experiments.simulation.served import compared_rates, measured_rates
from experiments.simulation.serving import simulate_rate

LOAD = """
lengths: {count: 16, prompt_tokens: 100, output_tokens: 200}
search: {low: 1, high: 200, steps: 3}
slo: {ttft: 0.5, itl: 0.05}
warmup: 1
seconds: 4
drain: 8
patience: 2
engine: {max_num_seqs: 8, max_model_len: 1024, block_size: 64,
  kv_cache_memory_bytes: 234881024, enable_prefix_caching: false}
arms:
  full: {}
  zipage: {policy: zipage, budget_tokens: 128}
  vllm: {backend: vllm}
"""


LIKE = ("model.path=models/qwen3-0.6b-shape", "model.load_format=dummy", "scenario.options.search=null")
LIKE += ("scenario.options.rates=[10,40]",)


@pytest.fixture(name="load")
def load_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(LOAD)
    return str(path)


def test_a_search_ends_between_a_rate_that_holds_and_one_that_does_not(load, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert simulate.main(["serve", load, "--model", "models/qwen3-0.6b-shape", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Simulated on H100")
    told = json.loads(out.read_text())
    assert told["command"].endswith(" --out rows.json"), "and no folder of this machine"
    rows = told["rows"]
    assert {row["arm"] for row in rows} == {"full", "zipage"}
    for arm in ("full", "zipage"):
        mine = [row for row in rows if row["arm"] == arm]
        held = [row["rate"] for row in mine if row["slo_holds"]]
        assert held
        assert max(held) < min(row["rate"] for row in mine if not row["slo_holds"])
        for row in mine:
            assert row["simulated"] == "H100"
            if row["slo_holds"]:
                assert row["finished"] == row["sent"]
                assert 0 < row["itl"]["p50"] <= row["itl"]["p99"] <= 0.05
                assert 0 < row["ttft"]["p50"] <= row["ttft"]["p99"] <= 0.5
    assert all(row["compressions"] for row in rows if row["arm"] == "zipage" and row["slo_holds"])


def test_an_idle_server_answers_at_the_pace_of_a_step(load, capsys, tmp_path):
    out = tmp_path / "rows.json"
    words = ["serve", f"{load}", "--rates", "0.5", "--model", "models/qwen3-0.6b-shape", "--out", str(out)]
    assert simulate.main(words) == 0
    found = json.loads(out.read_text())
    assert {"simulated", "seed", "commit", "diff"} <= found.keys()
    assert found["command"].startswith("python -m experiments.simulate serve")
    row = found["rows"][0]
    assert row["preemptions"] == 0
    assert row["running"] < 1
    assert row["e2e"]["p50"] == pytest.approx(row["ttft"]["p50"] + 199 * row["itl"]["p50"], rel=0.05)


def arms_of(load: str):
    experiment = load_experiment(["scenario=serve_bench", *LIKE, f"scenario.loads=[{load}]"])
    return experiment, served_arms(experiment, find_model(experiment.model), BACKENDS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rates simulated on an H200, as JSON."""
    path = tmp_path_factory.mktemp("load") / "small.yaml"
    path.write_text(LOAD)
    arms = arms_of(str(path))[1]
    rows = [simulate_rate(arm, read_machine("h200"), rate) for arm in arms[:2] for rate in (10, 40)]
    rows = [row | {"backend": "zipage", "refused": None, "streams": None} for row in rows]
    return json.dumps([*rows, rows[0] | {"backend": "vllm", "arm": "vllm"}])


@pytest.fixture(name="served")
def record_that_passes_for_served(load, rows, tmp_path, capsys):
    """These rates as a record of `scenario=serve_bench` has them."""
    experiment, arms = arms_of(load)
    folder = tmp_path / "served" / "small_h200"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(rows)
    write_config(folder, asdict(experiment))
    inputs = {"loads": content_hash([arm.plain() for arm in arms])}
    provenance = {"inputs": inputs, "hardware": {"gpus": ["NVIDIA H200"]}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def test_a_served_record_is_simulated_as_it_was_measured(served, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert simulate.main([str(served), "--out", str(out)]) == 0
    assert "| limits hold or not | same | 4 of 4" in capsys.readouterr().out
    rows = json.loads(out.read_text())["served"]
    assert [(row["arm"], row["rate"]) for row in rows] == [("full", 10), ("full", 40), ("zipage", 10), ("zipage", 40)]
    for row in rows:
        assert row["record"] == "served"
        for name in ("tokens_per_second", "ttft.p50", "e2e.p99", "compressions"):
            assert row[name]["simulated"] == row[name]["measured"]


def test_what_a_request_takes_to_its_engine_is_fitted_to_one_rate_and_predicts_another(served):
    """To the rates of full KV; the median of `zipage` is predicted."""
    true = read_machine("h200")
    free = replace(true, request_seconds=0.0)
    rows = list(compared_rates(served, free, None))
    fitted = request_constant(free, [row for row in rows if row["arm"] == "full"])
    assert fitted.request_seconds == pytest.approx(true.request_seconds, rel=0.2)
    lacking = [row["ttft.p50"] for row in compared_rates(served, fitted, None) if row["arm"] == "zipage"]
    assert all(abs(median["off"]) < 0.1 for median in lacking)
    assert all(row["ttft.p50"]["off"] < -0.2 for row in rows if row["rate"] == 10)


def test_the_constant_of_requests_is_fitted_alone(served, tmp_path, capsys, monkeypatch):
    machine = replace(read_machine("h200"), request_seconds=0.0)
    monkeypatch.setattr(fit, "read_machine", lambda name: machine)
    out = tmp_path / "machine.yaml"
    words = ["--only-served", "--served", str(served.parent), "--out", str(out)]
    assert fit.main(words) == 2
    assert "needs --trace" in capsys.readouterr().err
    assert fit.main([*words, "--trace", "of no use"]) == 0
    made = read_machine(out)
    assert made.request_seconds > 0.01
    assert made.origin == f"{machine.origin}, served"
    assert replace(made, request_seconds=0.0, origin=machine.origin) == machine


def test_a_load_that_has_changed_is_refused(served, load, capsys):
    Path(load).write_text(LOAD.replace("count: 16", "count: 17"))
    assert simulate.main([str(served)]) == 0
    assert "no longer those that were measured" in capsys.readouterr().out


def test_a_load_that_has_changed_is_found_as_it_was(served, load, tmp_path, monkeypatch):
    """The record names it as one of `conf/serve_bench/`, by one arm; two others of its name were not measured."""
    config = read_config(served)
    config["scenario"]["loads"] = ["small/zipage"]
    write_config(served, config)
    rows = [row for row in json.loads((served / "rows.json").read_text()) if row["arm"] == "zipage"]
    (served / "rows.json").write_text(json.dumps(rows))
    arms = arms_of(load)[1]
    inputs = {"loads": content_hash([arm.plain() for arm in arms if arm.name == "zipage"])}
    (served / "provenance.json").write_text(json.dumps({"inputs": inputs}))
    monkeypatch.setattr("experiments.simulation.served.LOADS", tmp_path / "loads")
    with pytest.raises(UsageError, match="no longer those that were measured"):
        measured_rates(served)
    for name, text in (("a", LOAD.replace("count: 16", "count: 17")), ("b", LOAD)):
        (tmp_path / "loads" / name).mkdir(parents=True)
        (tmp_path / "loads" / name / "small.yaml").write_text(text)
    assert [(rate.arm.name, rate.row["rate"]) for rate in measured_rates(served)] == [("zipage", 10), ("zipage", 40)]


def test_what_is_no_option_is_refused(load, capsys):
    assert simulate.main(["serve", load, "--set", "warmup"]) == 2
    assert "must be the name of an option" in capsys.readouterr().err
    assert simulate.main(["serve", load, "--set", "warm=1"]) == 2
    assert "unknown option warm" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no YAML"):
        given_options(["a=[1"])
