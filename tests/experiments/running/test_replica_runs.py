"""A run on several replicas is the run on one, under an id of its own."""

import json

import numpy as np
import pytest

from experiments.analysis import compare
from experiments.backends import BACKENDS
from experiments.records import load_events, load_requests, load_runs, load_steps
from experiments.run import main
from experiments.running.sweep import plan
from tests.tiny_models import save_tiny_model, save_tiny_tokenizer

pytestmark = pytest.mark.usefixtures("forked_children")

ITEMS = [{"question": f"What is {i} + {i}? " + "Think. " * i, "answer": f"#### {2 * i}"} for i in range(1, 9)]


@pytest.fixture
def given(tmp_path):
    folder, data = tmp_path / "tiny", tmp_path / "items.jsonl"
    save_tiny_tokenizer(save_tiny_model("qwen3", folder))
    data.write_text("\n".join(map(json.dumps, ITEMS)))
    options = ["model=hf", f"model.path={folder}", "workload=gsm8k", f"workload.path={data}", "hardware=cpu"]
    options += ["policy=random", "policy.budget_tokens=32", "policy.recent_tokens=8", "sampling.max_tokens=60"]
    options += ["engine.num_blocks=128", "engine.block_size=16", f"results_dir={tmp_path / 'runs'}", "sampling.n=2"]
    return options


def test_replicas_make_one_record_of_the_same_answers(given, tmp_path, monkeypatch):
    for size in (1, 2):
        monkeypatch.setattr("sys.argv", ["run", *given, f"engine.data_parallel_size={size}"])
        assert main() == 0
    runs = load_runs(tmp_path / "runs").sort_values("engine.data_parallel_size")
    assert len(runs) == 2
    one, two = (runs.iloc[i] for i in (0, 1))
    for column in ("output_token_ids", "output", "grade", "compressions", "finish_reason"):
        answers = [load_requests(run).sort_values(["prompt_id", "sample_index"])[column] for run in (one, two)]
        assert [np.array(x).tolist() for x in answers[0]] == [np.array(x).tolist() for x in answers[1]], column
    assert one["compressions"] == two["compressions"] > 0
    steps, events = load_steps(two), load_events(two)
    assert steps["time"].is_monotonic_increasing
    assert set(steps["replica"]) == set(events["replica"]) == {0, 1}
    assert set(load_steps(one)["replica"]) == {0}
    assert two["steps"] == len(steps) == two["counters.steps"]
    assert two["counters.blocks_total"] == 2 * one["counters.blocks_total"]
    assert two["counters.output_tokens"] == one["counters.output_tokens"]
    assert two["peak_running"] <= len(ITEMS) * 2
    table = compare(runs).set_index("run")
    hours = [table.loc[run["run"], "correct_per_gpu_hour"] * run["seconds"] for run in (one, two)]
    assert hours[1] * 2 == pytest.approx(hours[0])


def test_an_arm_on_replicas_does_not_share_its_model(given, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("axes: {engine.data_parallel_size: [1, 2]}\n")
    shared = [arm.shared for arm in plan([str(path)], given, BACKENDS)]
    assert shared[0] is not None
    assert shared[1] is None
