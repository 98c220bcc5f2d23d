"""Benchmarks of a tiny model on a CPU, and the arms of a load."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import run
from experiments.backends import BACKENDS
from experiments.bench import gate
from experiments.bench.loads import read_arms

LOAD = """
lengths: {count: 4, prompt_tokens: 20, output_tokens: 40}
warmup_tokens: 4
engine: {block_size: 16, num_blocks: 32, max_num_seqs: 4, max_num_batched_tokens: 64, max_model_len: 256}
arms:
  full: {}
  zipage: {policy: zipage, budget_tokens: 32, enable_prefix_caching: false}
"""


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


def arms_of(path: Path | str, model: str = "m", changes=None, trace=None, **given):
    return read_arms(
        [str(path)], model=model, given=given, changes=changes or {}, trace=trace, seed=0, repeats=1, backends=BACKENDS
    )
