"""Benchmarks run on a CPU, are recorded, and refuse what they can't do."""

# ruff: noqa: F811

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest

from experiments import archive
from experiments.backends import BACKENDS
from experiments.bench import __main__ as show
from experiments.bench import engine, gate
from experiments.bench import measure as measuring
from experiments.bench.measure import measure
from experiments.bench.roofline import ModelShape
from experiments.config.compose import load_experiment
from experiments.records import load_rows, load_runs
from experiments.reporting.plots import against_roofline
from kernels import bench as kernels
from kernels import bench_cases
from tests.experiments.backends.test_backends import StandIn
from tests.experiments.bench.bench_runs import LOAD, arms_of, bench, record_of, tiny  # noqa: F401

WINDOWS = """
lengths: {count: 6, prompt_tokens: 8, output_tokens: 100}
window_steps: 5
engine: {block_size: 16, num_blocks: 24, max_num_seqs: 8, max_num_batched_tokens: 64, max_model_len: 256}
arms:
  random: {staggered: 3, policy: random, budget_tokens: 32}
"""


def test_edited_policy_of_ones_own_is_another_benchmark(tiny, tmp_path, other_code):
    load = tmp_path / "load.yaml"
    load.write_text(LOAD.replace("policy: zipage", "policy: 'examples.my_policy:MyPolicy'"))
    options = ["scenario=engine_bench", f"scenario.loads=[{load}]", "model=dummy", f"model.path={tiny}", "hardware=cpu"]
    experiment = load_experiment(options)
    before, _ = engine.prepare(experiment, BACKENDS)
    assert engine.prepare(experiment, BACKENDS)[0] == before
    other_code("examples/my_policy.py")
    assert engine.prepare(experiment, BACKENDS)[0] != before


# scenario=kernels


def test_kernels_are_timed_and_recorded(bench, results, capsys, tmp_path, other_code):
    assert bench("scenario=kernels") == 0
    rows = load_rows(record_of(results))
    assert {"paged_decode", "paged_prefill", "store_kv", "attention_score", "redundancy", "compact_stable"} <= set(
        rows["kernel"]
    )
    assert (rows["ms"] > 0).all()
    assert rows["refused"].isna().all()
    assert rows["of_roofline"].isna().all()
    assert "no CUDA device" in capsys.readouterr().out
    assert bench("scenario=kernels") == 0
    out = capsys.readouterr().out
    assert "already done" in out
    assert "note:" not in out
    other_code("kernels/compact_stable_triton.py")
    assert bench("scenario=kernels") == 0
    assert "note: this benchmark is stale: the engine has changed since; force=stale" in capsys.readouterr().out
    assert load_runs(results).empty, "a benchmark is no run of a workload"
    assert archive.main([str(results), "--to", str(tmp_path / "copies")]) == 0
    assert len(load_rows(tmp_path / "copies" / record_of(results).name)) == len(rows)
    with pytest.raises(ValueError, match="share of a roofline"):
        against_roofline(rows)


def test_a_model_may_have_more_kv_heads_in_all_its_layers_than_query_heads():
    report = kernels.measure_kernels("cpu", {"layers": 6, "query_heads": 4, "kv_heads": 2}, rounds=1)
    assert all(row.refused is None for row in report.rows)


def test_a_wrong_kernel_is_refused_a_time(bench, results, monkeypatch, capsys):
    decode = bench_cases.paged_decode
    monkeypatch.setattr(bench_cases, "paged_decode", lambda *args: decode(*args) * 1.01)
    assert bench("scenario=kernels") == 1
    assert "rows were refused" in capsys.readouterr().err
    rows = load_rows(record_of(results))
    wrong = rows[rows["refused"].notna()]
    assert set(wrong["kernel"]) == {"paged_decode"}
    assert wrong["ms"].isna().all()


# scenario=engine_bench


def test_the_engine_is_timed_and_recorded(bench, results, tiny, tmp_path, capsys):
    for name, text in (("whole", LOAD), ("windows", WINDOWS)):
        (tmp_path / f"{name}.yaml").write_text(text)
    loads = f"scenario.loads=[{tmp_path / 'whole.yaml'},{tmp_path / 'windows.yaml'}]"
    assert bench("scenario=engine_bench", loads, f"model.path={tiny}") == 0
    rows = load_rows(record_of(results))
    assert list(rows["load"] + "/" + rows["arm"]) == ["whole/full", "whole/zipage", "windows/random"]
    assert (rows["lowest"] <= rows["tokens_per_second"]).all()
    assert (rows["tokens_per_second"] <= rows["highest"]).all()
    assert rows["compressions"][1] > 0
    assert rows["compression_ms"][1] > 0
    assert pd.isna(rows["compression_ms"][0])
    assert rows["steps"][2] == 10, "two windows of five"
    assert rows["gpu_idle"].between(0, 1).all()
    shape = ModelShape.read(tiny, "float32", "cpu")
    full, evicted = (rows["step_bytes"] - shape.weight_bytes)[:2] / shape.kv_bytes
    assert 4 * 20 < full < 4 * 60, "entries of four requests that grow from 20 to 60"
    assert evicted < 0.9 * full
    assert "| whole | zipage |" in " ".join(capsys.readouterr().out.split())
    assert show.main([str(record_of(results)), "--picture", str(tmp_path / "bench.png")]) == 0
    assert (tmp_path / "bench.png").stat().st_size > 0


ARRIVING = """
lengths: {trace: null}
warmup_tokens: 4
engine: {block_size: 16, num_blocks: 32, max_num_seqs: 4, max_num_batched_tokens: 64, max_model_len: 256}
arms:
  at_once: {}
  arriving: {arrivals: trace}
  evicting: {arrivals: trace, policy: zipage, budget_tokens: 32}
"""


def test_requests_of_a_trace_are_waited_for(bench, results, tiny, tmp_path, capsys):
    """Six of nine, 0.2 s apart: the engine idles in between, and how long one took counts from when it was due."""
    rows = [f"{i},{12 + i},{60 + i}" for i in range(9)]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival,prompt_tokens,output_tokens", *rows]))
    (tmp_path / "load.yaml").write_text(ARRIVING)
    arguments = [f"scenario.loads=[{tmp_path / 'load.yaml'}]", f"scenario.path={tmp_path / 'trace.csv'}"]
    options = {"lengths.count": 6, "speed": 5, "engine.max_num_seqs": 6}
    arguments += [f"scenario.options.{name}={value}" for name, value in options.items()]
    assert bench("scenario=engine_bench", f"model.path={tiny}", "scenario.repeats=1", *arguments) == 0
    rows = load_rows(record_of(results)).set_index("arm")
    assert (rows["requests"] == 6).all()
    seconds = sum(range(60, 66)) / rows["tokens_per_second"]
    assert rows["mean_batch"]["arriving"] < rows["mean_batch"]["at_once"]
    assert rows["compressions"]["evicting"] > 0
    assert pd.isna(rows["ttft_ms"]["at_once"])
    for arm in ("arriving", "evicting"):
        ttft, e2e = rows["ttft_ms"][arm], rows["e2e_ms"][arm]
        assert seconds[arm] > 1.0, "the last one comes after a second"
        assert 0 < ttft["p50"] <= ttft["p99"] < e2e["p99"] < 1e3 * seconds[arm]
    assert "| TTFT ms |" in " ".join(capsys.readouterr().out.split())


def test_an_interruption_costs_the_arms_that_are_not_done(bench, results, tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "load.yaml"
    path.write_text(LOAD)
    arguments = "scenario=engine_bench", f"scenario.loads=[{path}]", f"model.path={tiny}"
    measured, done = engine.measure, []

    def interrupted(arm, *rest):
        if len(done) == interrupted.after:
            raise KeyboardInterrupt
        done.append(arm.name)
        return measured(arm, *rest)

    monkeypatch.setattr(engine, "measure", interrupted)
    interrupted.after = 0
    assert bench(*arguments) == 130
    assert not list(results.glob("*/metrics.json"))
    interrupted.after = 1
    assert bench(*arguments) == 1
    rows = load_rows(record_of(results))
    assert rows["refused"].isna()[0]
    assert rows["refused"][1] == "interrupted"
    assert rows["tokens_per_second"][0] > 0


def test_no_repeat_finds_its_prompts_in_the_prefix_cache(bench, results, tiny, tmp_path, monkeypatch):
    path = tmp_path / "load.yaml"
    path.write_text(LOAD.replace("prompt_tokens: 20", "prompt_tokens: 40"))
    cached = []
    serve = measuring._served

    def observed(*arguments):
        served = serve(*arguments)
        cached.extend(output.metrics.cached_tokens for output in served.outputs.values())
        return served

    monkeypatch.setattr(measuring, "_served", observed)
    assert bench("scenario=engine_bench", f"scenario.loads=[{path}]", f"model.path={tiny}") == 0
    assert len(cached) == 2 * (1 + 4 + 2 * 4), "two arms: a start, a warm-up and two repeats of four requests"
    assert not any(cached)


def test_rows_are_kept_while_others_are_measured(bench, results, tiny, tmp_path, monkeypatch):
    """In the staging folder, which outlives the process where that is killed."""
    (tmp_path / "load.yaml").write_text(LOAD)
    measured, kept = engine.measure, []

    def observed(*arguments):
        kept.append([list(load_rows(path.parent)["arm"]) for path in results.glob("*.partial/rows.json")])
        return measured(*arguments)

    monkeypatch.setattr(engine, "measure", observed)
    assert bench("scenario=engine_bench", f"scenario.loads=[{tmp_path / 'load.yaml'}]", f"model.path={tiny}") == 0
    assert kept == [[], [["full"]]]


def test_arms_fail_alone(bench, results, tiny, tmp_path, monkeypatch, capsys):
    text = LOAD + "  vllm: {backend: vllm, num_blocks: null}\n  short: {max_model_len: 30}\n"
    (tmp_path / "load.yaml").write_text(text)
    monkeypatch.setattr(engine, "why_refused", lambda options: "tokens differ" if "policy" in options else None)
    engine._gate.cache_clear()
    assert bench("scenario=engine_bench", f"scenario.loads=[{tmp_path / 'load.yaml'}]", f"model.path={tiny}") == 1
    reasons = load_rows(record_of(results)).set_index("arm")["refused"]
    assert pd.isna(reasons["full"])
    assert reasons["zipage"] == "tokens differ"
    assert "backend=vllm needs a GPU" in reasons["vllm"]
    assert "4 of 4 outputs ended early: raise max_model_len" in reasons["short"]
    engine._gate.cache_clear()


def test_vllm_is_measured_by_the_same_code(monkeypatch, tiny, tmp_path):
    """On the stand-in, which makes two tokens a request."""
    vllm = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", vllm.sampling_params)
    (tmp_path / "load.yaml").write_text(
        "lengths: {count: 3, prompt_tokens: 5, output_tokens: 2}\n"
        "engine: {max_num_seqs: 3, kv_cache_memory_bytes: 1000000}\narms: {vllm: {backend: vllm}}\n"
    )
    (arm,) = arms_of(tmp_path / "load.yaml", str(tiny), device="cuda")
    ceilings = {"copy": 1e9, "read": 2e9, "matmul": 1e12}
    row = measure(arm, BACKENDS["vllm"], ceilings, None)
    assert (vllm.options["load_format"], vllm.options["skip_tokenizer_init"]) == ("dummy", True)
    assert row["tokens_per_second"] > 0
    assert row["floor_tokens_per_second"] > 0
    assert "gpu_idle" not in row
    assert row["steps"] == 2
    json.dumps(row)


def test_what_means_nothing_is_refused(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "_memory_available", lambda: 32e9)
    (tmp_path / "bad.yaml").write_text(LOAD + "  bad: {polcy: zipage}\n")
    (tmp_path / "worse.yaml").write_text(LOAD + "repeat: 3\n")
    for arguments, line in (
        (["scenario=kernels", "limit=3"], "limit=3: means nothing to scenario=kernels"),
        (["scenario=kernels", "policy=zipage"], "means nothing to scenario=kernels"),
        (["scenario=kernels", "scenario.loads=[ample]"], "scenario.loads=['ample']: means nothing"),
        (["scenario=kernels", "scenario.options.bach=3"], "scenario=kernels: bach: unknown option"),
        (["scenario=kernels", "scenario.options.batch=0"], "scenario=kernels: batch=0: must be a whole number"),
        (["scenario=kernels", "hardware.device=cuda"], "sees no CUDA device"),
        (["scenario=engine_bench", "hardware.device=cuda"], "sees no CUDA device"),
        (["scenario=kernels", "scenario.repeats=0"], "scenario.repeats=0: must be at least 1"),
        (["scenario=engine_bench", "scenario.options.batch=3"], "scenario.options: unknown option batch; known:"),
        (["scenario=engine_bench", "scenario.path=x"], "scenario.path=x: none of the loads takes a trace"),
        (["scenario=engine_bench", "workload=gsm8k"], "means nothing to scenario=engine_bench"),
        (["scenario=engine_bench", "scenario.loads=[amle]"], "scenario.loads=amle: no such load; known: alone, ample"),
        (["scenario=engine_bench", "scenario.loads=[short/x]"], "no such arm; short has full, zipage"),
        (["scenario=engine_bench", "scenario.loads=[]"], "scenario.loads=[]: name some of alone, ample"),
        (["scenario=engine_bench", f"scenario.loads=[{tmp_path / 'bad.yaml'}]"], "arms.bad: LLM: unknown option"),
        (["scenario=engine_bench", f"scenario.loads=[{tmp_path / 'worse.yaml'}]"], "unknown option repeat"),
        (["scenario=engine_bench", "model=hf", "model.path=x"], "model.load_format=auto"),
        (["scenario=engine_bench", "hardware.device=auto"], "no CUDA device here: hardware=cpu takes small loads"),
        (["scenario=engine_bench"], "ample/full needs 8"),
        (["scenario=all_at_once"], "scenario.repeats=2: must be left out: only benchmarks repeat"),
    ):
        assert bench(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1


def test_a_gate_tells_engines_apart(monkeypatch):
    options = {"block_size": 16, "policy": "zipage", "budget_tokens": 32, "device": "cpu"}
    options |= {"skip_tokenizer_init": True, "load_format": "dummy", "seed": 0, "max_num_batched_tokens": 64}
    assert gate.why_refused(options) is None
    tokens = gate._tokens
    monkeypatch.setattr(gate, "_tokens", lambda o, p, s: tokens(o | {"seed": int("enforce_eager" in o)}, p, s))
    assert "5 of 5 requests differ" in gate.why_refused(options)
