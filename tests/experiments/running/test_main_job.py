"""The main job as a user types it, on the real engine with a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from experiments import bench_transformers, run
from experiments.records import load_events, load_requests, load_runs, load_steps

ROOT = Path(__file__).parents[3]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A Qwen3 of two layers, and a tokenizer of bytes with a chat template."""
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|start|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}{% endfor %}<|start|>assistant: "
    fast.save_pretrained(folder)
    set_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=fast.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny, tmp_path) -> list[str]:
    return [
        "model=hf",
        f"model.path={tiny}",
        "workload=word_problems",
        "policy=full",
        "hardware=cpu",
        "hardware.threads=1",
        "limit=5",
        "engine.block_size=16",
        "engine.num_blocks=128",
        "sampling.temperature=0",
        "sampling.max_tokens=12",
        f"results_dir={tmp_path / 'runs'}",
    ]


def test_main_job(options, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "experiments.run", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    runs = load_runs(tmp_path / "runs")
    assert len(runs) == 1
    row = runs.iloc[0]
    assert f"record: {row['path']}" in done.stdout
    assert row["samples"] == 5
    assert row["errors"] == row["grader_errors"] == 0
    assert row["counters.requests_finished"] == 5
    assert row["memory.num_blocks"] == 128
    requests, steps = load_requests(row), load_steps(row)
    assert requests["output_tokens"].between(1, 12).all()
    assert (requests["output_token_ids"].map(len) == requests["output_tokens"]).all()
    assert (
        requests["prompt_tokens"] == requests["prompt"].str.count(r"<\|start\|>") + _bytes(requests["prompt"])
    ).all()
    assert (requests["ttft"] > 0).all()
    assert (requests["e2e"] >= requests["ttft"]).all()
    assert steps["prefill_tokens"].sum() + requests["cached_tokens"].sum() >= requests["prompt_tokens"].sum()
    assert steps["blocks_used"].max() <= 128

    monkeypatch.setattr(sys, "argv", ["run", *options])
    assert run.main() == 0
    assert "already done" in capsys.readouterr().out


ARMS = {
    "zipage": ["policy=zipage", "policy.budget_tokens=64"],
    "random attention": ["policy=random_attention", "policy.budget_tokens=64"],
    "zipage under pressure": ["policy=zipage", "policy.budget_tokens=64", "policy.trigger=pressure"],
    "in the step": ["policy=snapkv", "policy.budget_tokens=64", "policy.async_compression=false"],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_that_evicts(options, arm, device, tmp_path, monkeypatch, capsys):
    more = [f"hardware={device}", "hardware.threads=1", "sampling.max_tokens=60", "sampling.ignore_eos=true"]
    monkeypatch.setattr(sys, "argv", ["run", *options, *ARMS[arm], *more, "engine.trace_positions=true"])
    assert run.main() == 0
    (_, row), *_ = load_runs(tmp_path / "runs").iterrows()
    events = load_events(row)
    compressions = events[events["kind"] == "compress"]
    bound = arm != "zipage under pressure"
    assert (len(compressions) > 0) == bound
    assert row["compressions"] == row["counters.compressions_applied"] == len(compressions)
    assert row["budget_bound_share"] == float(bound)
    assert row["budget_never_bound"] == (not bound)
    assert ("the budget never bound" in capsys.readouterr().out) == (not bound)
    assert row["errors"] == 0
    for kept, number in zip(compressions["kept_positions"], compressions["num_tokens"], strict=True):
        assert kept.shape == (2, 2, 64)
        assert (kept < number).all()
        assert (kept[..., 1:] > kept[..., :-1]).all()


def _bytes(prompts):
    """Bytes of each prompt outside its special tokens."""
    return prompts.str.replace("<|start|>", "").map(lambda text: len(text.encode()))


def test_prompt_longer_than_the_pool_is_one_line(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *options, "engine.num_blocks=3"])
    assert run.main() == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("error: 5 of 5 samples could not be answered; the first is 00000: the prompt has")
    assert load_runs(tmp_path / "runs").empty


def test_bench_against_transformers(tiny, tmp_path, capsys):
    output = tmp_path / "bench.json"
    options = ["model=hf", f"model.path={tiny}", "hardware=cpu", "engine.block_size=16", "engine.num_blocks=128"]
    sizes = ["--batch", "3", "--alone", "2", "--tokens", "8"]
    assert bench_transformers.main([*options, *sizes, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["same_tokens"] == 1
    assert record["config"]["engine"]["dtype"] == "float32"
    rates = [record[name]["output_tokens_per_second"] for name in ("engine", "transformers")]
    assert record["ratio"] == pytest.approx(rates[0] / rates[1])
    assert record["provenance"]["model_files"].keys() >= {"config.json", "model.safetensors"}
    assert f"record: {output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["engine.blok_size=16"], "engine.blok_size: unknown option; did you mean engine.block_size?"),
        (["--alone", "9", "--batch", "2"], "--batch, --alone and --tokens must be at least 1, and --alone at most"),
        (["--batch", "64"], "--batch 64: the workload holds 48 problems"),
    ],
)
def test_wrong_bench_is_one_line(arguments, line, capsys):
    assert bench_transformers.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {line}")
    assert errors.count("\n") == 1
