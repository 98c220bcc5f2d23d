"""Time and memory to load and compare many runs: 10,000 of 1,000 requests each, written for the purpose.

    python -m pytest tests/benchmarks/bench_statistics.py -s                                # prints time and peak RSS
    RUNS=500 python -m pytest tests/benchmarks/bench_statistics.py -s                       # fewer
    python -m pytest tests/benchmarks/bench_statistics.py --benchmark-json=FILE             # writes the record

Every tenth run is full KV; the others are three policies with three budgets, of which one is the random control. All
10,000 resamples of the intervals are drawn. The files need 3.5 GB and some minutes.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import records
from experiments.analysis.comparison import compare
from experiments.analysis.metrics import summarise
from experiments.config.compose import load_experiment
from experiments.config.schema import to_dict
from experiments.paths import ROOT
from experiments.records import schemas
from zipage import EngineStats

RUNS, REQUESTS, TOKENS = int(os.environ.get("RUNS", "10000")), 1_000, 128
SECONDS, GIGABYTES = 60, 4
POLICIES = ("zipage", "snapkv", "random_attention")
BUDGETS = (512, 1024, 2048)


def request_columns(random: np.random.Generator) -> dict[str, list | pa.Array]:
    """All columns of `requests.parquet` but the grades."""
    rows = range(REQUESTS)
    tokens = pa.array(random.integers(0, 50_000, REQUESTS * TOKENS, dtype=np.int32))
    return {
        "prompt_id": [f"{i:05d}" for i in rows],
        "sample_index": [0] * REQUESTS,
        "kind": ["synthetic"] * REQUESTS,
        "prompt": [f"question {i} " * 20 for i in rows],
        "output": [f"answer {i} " * 40 for i in rows],
        "output_token_ids": pa.ListArray.from_arrays(np.arange(REQUESTS + 1, dtype=np.int32) * TOKENS, tokens),
        "gold": [str(i) for i in rows],
        "extracted": [str(i) for i in rows],
        "grader_error": [None] * REQUESTS,
        "finish_reason": ["stop"] * REQUESTS,
        "stop_reason": ["2"] * REQUESTS,
        "error": [None] * REQUESTS,
        **{name: random.exponential(size=REQUESTS) for name in ("arrival", "ttft", "tpot", "e2e", "queued")},
        "prompt_tokens": [100] * REQUESTS,
        "output_tokens": [TOKENS] * REQUESTS,
        **{name: [1] * REQUESTS for name in ("cached_tokens", "preemptions", "pauses", "compressions")},
    }


def write_runs(folder: Path) -> None:
    random = np.random.default_rng(0)
    choices = ["policy=full", *(f"policy={p} policy.budget_tokens={b}" for p in POLICIES for b in BUDGETS)]
    configs = [to_dict(load_experiment(["model=dummy", "model.path=m", *choice.split()])) for choice in choices]
    columns = request_columns(random)
    graded = {**columns, "grade": np.ones(REQUESTS)}
    table = pa.table({name: graded[name] for name in schemas.REQUEST_SCHEMA.names}, schema=schemas.REQUEST_SCHEMA)
    metrics = summarise(table.to_pylist(), [], [], seconds=100.0, evicts=True)
    metrics |= {"counters": dict.fromkeys(EngineStats.__slots__, 1)}
    place = schemas.REQUEST_SCHEMA.get_field_index("grade")
    provenance = (ROOT / "results" / "records" / "demo" / records.PROVENANCE).read_text()
    for number in range(RUNS):
        seed, choice = divmod(number, len(configs))
        run = folder / f"run-{number:05d}"
        run.mkdir()
        grades = random.binomial(1, 0.6, REQUESTS).astype(float)
        records.write_config(run, configs[choice] | {"seed": seed})
        (run / records.PROVENANCE).write_text(provenance)
        pq.write_table(
            table.set_column(place, "grade", pa.array(grades)),
            run / records.REQUESTS,
            compression="zstd",
            row_group_size=schemas._ROW_GROUP,
        )
        (run / records.METRICS).write_text(json.dumps(metrics | {"accuracy": grades.mean()}, indent=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder)
    return folder


@pytest.mark.parametrize("loops", ["recorded", "from tokens"])
def test_load_and_compare(benchmark, folder, loops):
    def load_and_compare():
        runs = records.load_runs(folder)
        return compare(runs if loops == "recorded" else runs.drop(columns="loop_rate"), margin=0.05, ttft=1.0, tpot=1.0)

    before = time.process_time()
    table = benchmark.pedantic(load_and_compare, rounds=1)
    cpu = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    benchmark.extra_info |= {"runs": RUNS, "requests": REQUESTS, "peak_rss_gib": peak, "cpu_seconds": cpu}
    seconds = benchmark.stats["max"]
    print(f"\nloops {loops}: {RUNS:,} runs in {seconds:.1f} s ({cpu:.1f} s of CPU), peak RSS {peak:.2f} GiB")
    assert len(table) == RUNS
    assert table["full.verdict"].notna().sum() == RUNS - len(table[table["policy.name"] == "full"])
    assert table["random.verdict"].notna().sum() == sum(table["policy.name"].isin(["zipage", "snapkv"]))
    assert seconds < SECONDS or loops != "recorded"
    assert peak < GIGABYTES
