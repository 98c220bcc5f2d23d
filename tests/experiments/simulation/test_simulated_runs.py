"""`scenario=simulate`: a run's record, made on a CPU, that says everywhere that it is simulated."""

import json
from pathlib import Path

import pytest

from experiments.analysis.baselines import devices, full_kv
from experiments.config.compose import load_experiment
from experiments.config.options import told_apart
from experiments.errors import RunError, UsageError
from experiments.records import load_events, load_requests, load_runs, load_steps
from experiments.reporting.plots.style import run_names
from experiments.reporting.runs_table import runs_table, with_notes
from experiments.running import job

LOAD = [
    "scenario=simulate",
    "model=qwen3_06b_shape",
    "workload=lengths",
    "workload.options.count=12",
    "workload.options.prompt_tokens=100",
    "workload.options.output_tokens=300",
    "engine.max_model_len=1024",
    "engine.max_num_seqs=8",
    "engine.block_size=64",
]
BOUNDED = ["policy=zipage", "policy.budget_tokens=128"]


def run(folder: Path, *options: str) -> Path:
    return job.run(load_experiment([*LOAD, f"results_dir={folder}", *options]), shows=False)


@pytest.fixture(scope="module", name="bounded")
def bounded_run(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), *BOUNDED, "scenario.arrival=poisson", "scenario.rate=20")


def test_the_record_is_a_run_s(bounded):
    runs, steps, requests, events = (
        load_runs(bounded),
        load_steps(bounded),
        load_requests(bounded),
        load_events(bounded),
    )
    assert (requests["output_tokens"] == 300).all()
    assert len(events[events["kind"] == "compress"]) == runs["compressions"].iloc[0] > 0
    assert runs["counters.steps"].iloc[0] == len(steps) >= 300
    assert runs["ttft.p99"].iloc[0] < 1
    assert runs["rate.offered"].iloc[0] > 0


def test_it_says_everywhere_that_it_is_simulated(bounded):
    origin = json.loads((bounded / "provenance.json").read_text())
    assert origin["simulated"]["name"] == "H100"
    assert origin["hardware"]["gpus"] == ["H100 (simulated)"]
    runs = load_runs(bounded)
    assert devices(runs) == ["H100 (simulated)"]
    assert "zipage, simulated" in runs_table(runs)
    assert "1 run simulated" in with_notes(runs)
    assert "simulated" in run_names(runs).iloc[0]


def test_no_fact_is_looked_for_in_a_simulated_answer(tmp_path):
    problems = ["model=reasoner", "workload=program_trace", "limit=2", "sampling.max_tokens=8"]
    folder = job.run(load_experiment(["scenario=simulate", *problems, f"results_dir={tmp_path}"]), shows=False)
    assert load_runs(folder)["facts_known"].isna().all()


def test_a_budget_that_blocks_enlarge_is_pointed_out_once(tmp_path, capsys, caplog):
    run(tmp_path, "policy=zipage", "policy.budget_tokens=100")
    note = "note: policy.budget_tokens=100: whole blocks of 64 make it 128, 28% more; a smaller engine.block_size comes"
    said = capsys.readouterr().out + caplog.text
    assert said.count(note) == 1
    assert "rounded up" not in said, "the engine's own words for it"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("engine.num_blocks=1", "raise engine.num_blocks or shorten it"),
        ("engine.kv_cache_memory_bytes=1000", "raise engine.gpu_memory_utilization or engine.kv_cache_memory_bytes"),
        ("engine.data_parallel_size=2", "engine.data_parallel_size=2: only one replica can be simulated"),
        ("engine.block_size=17", "engine.block_size=17: must be a power of two"),
        (
            "policy.recent_tokens=300",
            "policy.budget_tokens=128 leaves nothing to choose beside policy.recent_tokens=300",
        ),
    ],
)
def test_errors_name_options_as_they_were_typed(tmp_path, option, said):
    with pytest.raises((UsageError, RunError)) as caught:
        run(tmp_path, *BOUNDED, option)
    assert said in str(caught.value)
    assert "engine: " not in str(caught.value)


def test_a_measured_run_is_no_baseline_of_a_simulated_one(tmp_path):
    run(tmp_path, *BOUNDED)
    full = run(tmp_path, "policy=full")
    runs = load_runs(tmp_path)
    assert sum(base is not None for base in full_kv(runs)) == 1
    is_full = runs["path"] == str(full)
    runs["scenario.kind"] = runs["scenario.kind"].mask(is_full, "serve")
    runs["scenario.machine"] = runs["scenario.machine"].mask(is_full, None)
    runs["provenance.hardware.gpus"] = [
        ["H100"] if full else gpus for full, gpus in zip(is_full, runs["provenance.hardware.gpus"])
    ]
    assert full_kv(runs) == [None, None]
    assert "scenario.machine" in told_apart(runs)


def test_a_request_that_is_refused_at_once_costs_no_other(tmp_path):
    """Before the first step no time has passed: the clock is the model's."""
    trace = tmp_path / "lengths.csv"
    load = [option for option in LOAD if not option.startswith("workload")]
    load += ["workload=trace", "scenario.arrival=trace", f"scenario.path={trace}", f"results_dir={tmp_path}"]
    trace.write_text("arrival,prompt_tokens,output_tokens\n0,2000,20\n1,100,20\n")
    requests = load_requests(job.run(load_experiment(load), shows=False))
    assert requests["error"].isna().tolist() == [False, True]
    trace.write_text("arrival,prompt_tokens,output_tokens\n0,2000,20\n1,2000,20\n")
    with pytest.raises(RunError, match="2 of 2 samples could not be answered"):
        job.run(load_experiment(load), shows=False)


def test_the_same_run_on_the_same_machine_is_done(bounded, capsys):
    options = [*BOUNDED, "scenario.arrival=poisson", "scenario.rate=20"]
    assert run(bounded.parent, *options) == bounded
    assert "already done" in capsys.readouterr().out
    assert run(bounded.parent, *options, "scenario.machine=h200") != bounded


@pytest.mark.parametrize(
    "options",
    [
        ["scenario.arrival=steady", "scenario.seconds=0.3", "workload.options.count=400"],
        ["scenario.arrival=all_at_once"],
    ],
)
def test_other_scenarios(tmp_path, options):
    folder = run(tmp_path, *BOUNDED, *options)
    assert load_runs(folder)["output_tokens_per_second"].iloc[0] > 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["scenario.machine=h999"], "no such machine"),
        (["scenario.machine=null"], "scenario.machine"),
        (["backend=transformers"], "backend"),
        (["scenario=all_at_once", "scenario.machine=h100"], "scenario.machine"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, what):
    with pytest.raises(UsageError, match=what):
        run(tmp_path, *options)
