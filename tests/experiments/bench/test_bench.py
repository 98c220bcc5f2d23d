"""Benchmarks run on a CPU, refuse what they can't do, and compute what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import pandas as pd
import pytest
import torch
from transformers import AutoConfig

from experiments import archive, run
from experiments.backends import BACKENDS
from experiments.bench import __main__ as show
from experiments.bench import engine, gate
from experiments.bench import measure as measuring
from experiments.bench.loads import LOADS, read_arms
from experiments.bench.measure import _Observed, _served, measure
from experiments.bench.ratios import against
from experiments.bench.roofline import EntriesRead, ModelShape, step_floor
from experiments.bench.tables import markdown
from experiments.config.compose import load_experiment
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import load_rows, load_runs
from experiments.reporting.plots import against_roofline
from kernels import bench as kernels
from kernels import bench_cases
from tests.experiments.backends.test_backends import StandIn
from zipage import LLM, EngineConfig, StepStats
from zipage.models.loading.hf_config import spec_from_config
from zipage.worker.memory_plan import plan_memory

LOAD = """
lengths: {count: 4, prompt_tokens: 20, output_tokens: 40}
warmup_tokens: 4
engine: {block_size: 16, num_blocks: 32, max_num_seqs: 4, max_num_batched_tokens: 64, max_model_len: 256}
arms:
  full: {}
  zipage: {policy: zipage, budget_tokens: 32, enable_prefix_caching: false}
"""
WINDOWS = """
lengths: {count: 6, prompt_tokens: 8, output_tokens: 100}
window_steps: 5
engine: {block_size: 16, num_blocks: 24, max_num_seqs: 8, max_num_batched_tokens: 64, max_model_len: 256}
arms:
  random: {staggered: 3, policy: random, budget_tokens: 32}
"""
EIGHT_B = ROOT / "models" / "qwen3-8b-shape"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(gate.SHAPE | sizes))
    return folder


@pytest.fixture
def bench(tiny, results, monkeypatch):
    def bench(*arguments: str) -> int:
        given = ["hardware=cpu", f"results_dir={results}", "scenario.repeats=2", *arguments]
        monkeypatch.setattr(sys, "argv", ["experiments.run", *given])
        return run.main(BACKENDS)

    return bench


def record_of(results: Path) -> Path:
    (record,) = (path.parent for path in results.glob("*/metrics.json"))
    return record


def arms_of(path: Path | str, model: str = "m", **given):
    return read_arms([str(path)], model=model, given=given, seed=0, repeats=1, backends=BACKENDS)


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


def test_shares_of_the_roofline():
    ceilings = kernels.Ceilings(copy=1e9, read=2e9, matmul=1e12)
    device = kernels.torch.device("cpu")
    for case, seconds in (
        (kernels.Case("k", "", lambda: None, lambda: (0.0, 0.0), read=10**9, written=0), 0.5),
        (kernels.Case("k", "", lambda: None, lambda: (0.0, 0.0), read=10**9, written=10**9), 2.0),
        (kernels.Case("k", "", lambda: None, lambda: (0.0, 0.0), read=1, written=1, flops=3 * 10**12), 3.0),
    ):
        row = kernels._row(case, ceilings, device, 3)
        assert row.of_roofline * row.ms / 1e3 == pytest.approx(seconds)


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
    assert rows["steps"][2] == 10, "two windows of five"
    assert rows["gpu_idle"].between(0, 1).all()
    shape = ModelShape.read(tiny, "float32", "cpu")
    full, evicted = (rows["step_bytes"] - shape.weight_bytes)[:2] / shape.kv_bytes
    assert 4 * 20 < full < 4 * 60, "entries of four requests that grow from 20 to 60"
    assert evicted < 0.9 * full
    assert "| whole | zipage |" in " ".join(capsys.readouterr().out.split())
    assert show.main([str(record_of(results)), "--picture", str(tmp_path / "bench.png")]) == 0
    assert (tmp_path / "bench.png").stat().st_size > 0


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
        (["scenario=engine_bench", "scenario.options.batch=3"], "scenario.options.batch=3: means nothing"),
        (["scenario=engine_bench", "workload=gsm8k"], "means nothing to scenario=engine_bench"),
        (["scenario=engine_bench", "scenario.loads=[amle]"], "scenario.loads=amle: no such load; known: ample"),
        (["scenario=engine_bench", "scenario.loads=[short/x]"], "no such arm; short has full, zipage"),
        (["scenario=engine_bench", "scenario.loads=[]"], "scenario.loads=[]: name some of ample"),
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


@pytest.mark.parametrize("path", sorted(LOADS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_load_is_sound(path):
    for arm in arms_of(path):
        longest = max(prompt + output for prompt, output in arm.lengths)
        assert longest <= arm.options["max_model_len"]
        assert arm.window_steps is not None or len(arm.lengths) <= arm.options["max_num_seqs"]


def test_staggered_requests_end_where_the_others_do():
    (arm,) = (arm for arm in arms_of("long") if arm.name == "full")
    assert {prompt + output for prompt, output in arm.lengths} == {128 + 16_384}
    assert [prompt for prompt, _ in arm.lengths[43:]] == [128] * (312 - 43)
    begun = sorted(prompt for prompt, _ in arm.lengths[:43])
    assert begun[0] < 400
    assert begun[-1] > 16_000


def test_staggered_requests_hold_what_their_budget_lets_them():
    (arm,) = (arm for arm in arms_of("long") if arm.name == "zipage")
    begun = arm.lengths[:166]
    assert sorted(output for _, output in begun)[::165] == [50, 16_384 - 49]
    held = [prompt for prompt, output in begun if output < 16_384 - 2048]
    assert min(held) > 2048
    assert 2048 + 240 < max(held) <= 2048 + 256
    assert sum(held) / len(held) == pytest.approx(2048 + 128, rel=0.01)


STAGGERED = """
lengths: {count: 64, prompt_tokens: 16, output_tokens: 2000}
window_steps: 5
engine: {block_size: 64, num_blocks: 99, max_num_seqs: 64, max_model_len: 4096, policy: random, budget_tokens: 200}
arms:
  whole_blocks: {staggered: 64}
  pressure: {staggered: 64, trigger: pressure}
"""


def test_staggered_budgets_are_whole_blocks_and_bound_nothing_under_pressure(tmp_path):
    path = tmp_path / "load.yaml"
    path.write_text(STAGGERED)
    bounded, pressed = ([held for held, _ in arm.lengths] for arm in arms_of(path))
    assert 256 < max(bounded) <= 256 + 64
    assert max(pressed) > 1900
    path.write_text(STAGGERED.replace("trigger: pressure", "protection: prompt"))
    with pytest.raises(UsageError, match="protection=prompt: a staggered prompt"):
        arms_of(path)


def test_one_arm_of_a_load():
    assert [arm.title for name in ("short/vllm", "ample") for arm in arms_of(name)][:2] == ["short/vllm", "ample/full"]


def test_the_command_line_wins_over_a_load():
    assert all(arm.options["max_num_seqs"] == 7 for arm in arms_of("ample", max_num_seqs=7))


def test_a_gate_tells_engines_apart(monkeypatch):
    options = {"block_size": 16, "policy": "zipage", "budget_tokens": 32, "device": "cpu"}
    options |= {"skip_tokenizer_init": True, "load_format": "dummy", "seed": 0, "max_num_batched_tokens": 64}
    assert gate.why_refused(options) is None
    tokens = gate._tokens
    monkeypatch.setattr(gate, "_tokens", lambda o, p, s: tokens(o | {"seed": int("enforce_eager" in o)}, p, s))
    assert "5 of 5 requests differ" in gate.why_refused(options)


# Ratios


def rates(load: str, arm: str, *repeats: float) -> dict:
    return {"load": load, "arm": arm, "repeats": list(repeats), "tokens_per_second": repeats[0] if repeats else None}


def test_ratios_to_an_arm_stay_within_a_load_and_have_intervals_where_there_are_repeats():
    rows = [
        rates("a", "full", 98, 100, 102),
        rates("a", "half", 49, 50, 51),
        rates("a", "none"),
        rates("b", "full", 80),
        rates("b", "once", 40),
        rates("c", "half", 1, 2),
    ]
    table = against(pd.DataFrame(rows), "full")
    assert list(table["load"] + "/" + table["arm"]) == ["a/full", "a/half", "b/full", "b/once"]
    # Welch: deviations of 2 % over three repeats; t(0.975, 4) is 2.776, and 2.776 * 0.02 * sqrt(2 / 3) is 4.5 %.
    assert list(table["of full"]) == ["1.000", "0.500 [0.478, 0.523]", "1.000", "0.500"]


def test_equal_engines_differ_as_often_as_the_interval_says():
    random, outside = Random(0), 0
    for _ in range(400):
        a, b = ([random.gauss(100, 1) for _ in range(8)] for _ in range(2))
        ratio = against(pd.DataFrame([rates("l", "a", *a), rates("l", "b", *b)]), "b")["of b"][0]
        low, high = map(float, ratio.split("[")[1].rstrip("]").split(","))
        outside += not low <= 1 <= high
    assert 0.02 < outside / 400 < 0.085


def test_ratios_need_an_arm_that_was_timed(bench, results, capsys):
    with pytest.raises(UsageError, match="--against none: no such arm was timed; there are full, half"):
        against(pd.DataFrame([rates("a", "full", 1, 2), rates("a", "half", 1), rates("a", "none")]), "none")
    assert bench("scenario=kernels") == 0
    assert show.main([str(record_of(results)), "--against", "full"]) == 2
    assert "the record has no engines" in capsys.readouterr().err


# The roofline


def test_shape_of_qwen3_8b():
    shape = ModelShape.read(EIGHT_B, "auto", "cuda")
    assert shape.kv_bytes == 147_456
    assert shape.weight_bytes / 1e9 == pytest.approx(15.1, abs=0.05)
    assert ModelShape.read(EIGHT_B, "auto", "cpu").kv_bytes == 2 * 147_456
    with pytest.raises(UsageError, match=r"needs a config\.json"):
        ModelShape.read(EIGHT_B.parent, "auto", "cpu")


def test_floor_of_a_step():
    shape = ModelShape(weight_bytes=1000, kv_bytes=10, token_flops=50, vocab_size=1)
    assert step_floor(shape, 0, 0, 100.0, 1.0) == 10.0
    assert step_floor(shape, 200, 0, 100.0, 1.0) == 30.0
    assert step_floor(shape, 200, 4, 100.0, 20.0) == 40.0


@pytest.mark.parametrize("policy", [{}, {"policy": "zipage", "budget_tokens": 32}])
def test_entries_are_followed_to_the_last(tiny, tmp_path, policy):
    """In a short pool, with preemptions and pauses: what is held is what the blocks hold, and nothing at the end."""
    (tmp_path / "load.yaml").write_text(LOAD)
    arm = arms_of(tmp_path / "load.yaml", str(tiny), num_blocks=9, device="cpu", enable_prefix_caching=False)[0]
    llm = LLM(**arm.options | policy)
    shape = ModelShape.read(tiny, "float32", "cpu")
    with _Observed(llm, arm, shape) as observed:
        _served(observed, arm, "a", [[i + 1] * 20 for i in range(4)], [60] * 4)
    held = observed._reads.entries
    assert observed._reads._held == 0
    assert all(entries <= 16 * step.blocks_total for step, entries in zip(observed.steps, held, strict=True))
    assert any(observed.repeat(1.0).counts.values())
    llm.shutdown()


def test_a_pool_bounds_what_is_read():
    known = {"prefill_tokens": 80, "num_decode": 0, "num_prefill": 2, "num_running": 4}
    step = StepStats(**{name: known.get(name, 0) for name in StepStats.__slots__})
    for most, expected in ((None, 40.0), (50, 25.0)):
        reads = EntriesRead(most)
        reads.step(step)
        assert reads.entries == [expected]


def test_table_leaves_out_what_no_row_has():
    rows = pd.DataFrame([{"load": "a", "arm": "b", "tokens_per_second": 1234.5, "gpu_idle": None, "refused": None}])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines()]
    assert [cells[0], *cells[2:]] == [["load", "arm", "tokens/s"], ["a", "b", "1,234"]]


@pytest.mark.parametrize(("load", "arm"), [("ample", "full"), ("pressure", "full"), ("pressure", "pressure")])
def test_ample_memory_holds_every_request_to_its_end(load, arm):
    (found,) = (a for a in arms_of(load) if a.name == arm)
    options = found.options | {"model": "models/qwen3-8b-shape"}
    config = EngineConfig.from_kwargs(**options)
    spec = spec_from_config(AutoConfig.from_pretrained(ROOT / "models/qwen3-8b-shape"))
    policy = config.make_policy()
    rule = None if policy is None else config.rule(policy, config.budget_tokens, config.max_model_len)
    plan = plan_memory(
        config, spec, torch.bfloat16, 0, policy=policy, max_blocks=rule and rule.max_blocks,
        max_model_len=config.max_model_len,
    )  # fmt: skip
    needed = sum(-(-sum(lengths) // config.block_size) for lengths in found.lengths)
    assert needed <= plan.num_blocks < 1.05 * needed
