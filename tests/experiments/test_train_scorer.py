"""`python -m experiments.train_scorer`, and the scorer that comes with the shipped reasoner."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from experiments import train_scorer
from experiments.paths import REASONER
from tests.tiny_models import save_tiny_model, save_tiny_tokenizer
from zipage import LLM, SamplingParams


def test_the_command_trains_the_same_scorer_again(tmp_path, capsys):
    folder = save_tiny_model("qwen3", tmp_path / "model", num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    options = ["--tokens", "1500", "--max-tokens", "20", "--device", "cpu"]
    for name in ("one", "two"):
        assert train_scorer.main([str(folder), "--out", str(tmp_path / name), *options]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(re.findall(r"^layer [01]: held-out R\^2 -?\d+\.\d{3}$", capsys.readouterr().out, re.MULTILINE)) == 4
    assert train_scorer.main([str(folder), "--out", str(tmp_path / "three"), *options, "--target", "future"]) == 0
    assert train_scorer.main([str(folder), "--out", str(tmp_path / "no"), *options, "--tokens", "50"]) == 2
    assert "give at least 10, of which one is held out" in capsys.readouterr().err
    for wrong in (["--ridge", "0"], ["--tokens", "0"], ["--target", "past"]):
        with pytest.raises(SystemExit):
            train_scorer.main([str(folder), "--out", str(tmp_path / "no"), *wrong])
    for name in ("one", "three"):
        options = {"policy": "kvzap", "policy_options": {"calibration": str(tmp_path / name)}, "budget_tokens": 32}
        llm = LLM(str(folder), device="cpu", num_blocks=16, block_size=16, debug=True, **options)
        (output,) = llm.generate(["a prompt"], SamplingParams(max_tokens=60, ignore_eos=True), use_tqdm=False)
        assert output.metrics.compressions > 0


def test_the_shipped_scorer_fits_the_shipped_model_and_tells_entries_apart():
    path = REASONER / "calibration" / "kvzap.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["calibration"])
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    assert (header["kind"], header["target"], header["corpus"], header["seed"]) == ("kvzap", "future", "reasoner", 0)
    assert weight.dtype == bias.dtype == torch.float32
    assert (weight.shape, bias.shape) == ((8, 2, 384), (8, 2))
    assert path.stat().st_size < 32 * 1024
    assert min(header["held_out_r2"]) > 0.3
    options = {"policy": "kvzap", "policy_options": {"calibration": str(path)}, "budget_tokens": 64}
    llm = LLM(str(REASONER), device="cpu", num_blocks=32, block_size=16, debug=True, **options)
    (output,) = llm.generate(["1 + 1"], SamplingParams(max_tokens=120, ignore_eos=True), use_tqdm=False)
    assert output.metrics.compressions > 0
