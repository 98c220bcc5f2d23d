"""Loads of `scenario=serve_bench` on a simulated server."""

import json

import pytest

from experiments import simulate
from experiments.errors import UsageError
from experiments.simulation.serve_command import given_options

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
    rows = json.loads(out.read_text())["rows"]
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


def test_what_is_no_option_is_refused(load, capsys):
    assert simulate.main(["serve", load, "--set", "warmup"]) == 2
    assert "must be the name of an option" in capsys.readouterr().err
    assert simulate.main(["serve", load, "--set", "warm=1"]) == 2
    assert "unknown option warm" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no YAML"):
        given_options(["a=[1"])
