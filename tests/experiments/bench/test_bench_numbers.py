"""What benchmarks compute from their timings: ratios, shares of the roofline and tables."""

# ruff: noqa: F811

from __future__ import annotations

import statistics
from random import Random

import pandas as pd
import pytest
import transformers

from experiments.bench import __main__ as show
from experiments.bench.measure import _Observed, _served
from experiments.bench.ratios import against
from experiments.bench.roofline import EntriesRead, ModelShape, sliding_layers, step_floor
from experiments.bench.tables import markdown
from experiments.errors import UsageError
from experiments.paths import ROOT
from kernels import bench as kernels
from tests.experiments.bench.bench_runs import LOAD, arms_of, bench, record_of, tiny  # noqa: F401
from zipage import LLM, StepStats

EIGHT_B = ROOT / "models" / "qwen3-8b-shape"


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
    shape = ModelShape(weight_bytes=1000, kv_bytes=20, read_bytes=10, token_flops=50, vocab_size=1)
    assert step_floor(shape, 0, 0, 0, 100.0, 1.0) == 10.0
    assert step_floor(shape, 200, 9, 0, 100.0, 1.0) == 30.0
    assert step_floor(shape, 200, 9, 4, 100.0, 20.0) == 40.0


def test_floor_of_a_mixture_of_experts_grows_with_the_experts_that_a_step_reads():
    """gpt-oss-20b: 3.6 billion weights of one token, 20.9 of all; the input embedding is looked up."""
    shape = ModelShape.read(EIGHT_B.with_name("gpt-oss-20b-shape"), "auto", "cuda")
    assert shape.read_weights(1) == shape.weight_bytes
    assert shape.touched_experts(2) == pytest.approx(32 - 28 * 28 / 32)
    assert shape.read_weights(2) / 2e9 == pytest.approx(3.6 + 3.5 * 24 * 3 * 2880 * 2880 / 1e9, abs=0.06)
    assert shape.read_weights(10_000) == shape.held_weights
    assert shape.held_weights / 2e9 == pytest.approx(20.9 - 0.6, abs=0.06)
    reads = step_floor(shape, 0, 10_000, 0, 1e12, 1.0)
    assert reads == shape.held_weights / 1e12


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_experts_of_a_step_are_as_many_as_random_tokens_are_sent_to(tokens):
    shape = ModelShape.read(EIGHT_B.with_name("qwen3-30b-a3b-shape"), "auto", "cuda")
    random = Random(0)
    seen = [len({e for _ in range(tokens) for e in random.sample(range(128), 8)}) for _ in range(200)]
    assert shape.touched_experts(tokens) == pytest.approx(statistics.mean(seen), abs=0.5)


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


def test_entries_read_are_of_all_that_run_on_all_replicas():
    reads = EntriesRead()
    for replica, filled, running in ((0, 60, 2), (1, 40, 2), (0, 0, 2)):
        known = {"prefill_tokens": filled, "num_decode": 2, "num_running": running, "replica": replica}
        reads.step(StepStats(**{name: known.get(name, 0) for name in StepStats.__slots__}))
    assert reads.entries == [62.0, 104 / 2, 106 / 2]


def test_table_leaves_out_what_no_row_has():
    rows = pd.DataFrame([{"load": "a", "arm": "b", "tokens_per_second": 1234.5, "gpu_idle": None, "refused": None}])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines()]
    assert [cells[0], *cells[2:]] == [["load", "arm", "tokens/s"], ["a", "b", "1,234"]]


@pytest.mark.parametrize(
    ("name", "options"),
    [("Gemma3TextConfig", {}), ("Gemma3TextConfig", {"sliding_window_pattern": 4}), ("GptOssConfig", {})],
)
def test_windows_without_layer_types_are_those_of_transformers(name, options):
    """As the hub has google/gemma-3-1b-it."""
    filled_in = getattr(transformers, name)(**options, num_hidden_layers=14)
    written = {"model_type": filled_in.model_type, "num_hidden_layers": 14, **options}
    expected = [i for i, kind in enumerate(filled_in.layer_types) if kind == "sliding_attention"]
    assert sliding_layers(written) == expected
