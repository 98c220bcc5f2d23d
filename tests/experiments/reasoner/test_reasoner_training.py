"""The reasoner's network, its training, and the trained weights that the clone ships."""

# ruff: noqa: F811

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from experiments import train_reasoner
from experiments.paths import REASONER
from experiments.reasoner import network, training
from experiments.reasoner.packing import IGNORED, pack, to_document
from experiments.reasoner.tokenizer import VOCABULARY
from experiments.reasoner.training import TrainingOptions
from experiments.workloads import GENERATORS
from tests.experiments.reasoner.small_training import (
    CHAT,
    documents,
    tiny,  # noqa: F401
    tiny_config,
)
from tests.tiny_models import transformers_greedy
from zipage import LLM, SamplingParams


class TestNetwork:
    def test_packed_attention_equals_every_document_alone(self, tiny):
        model = network.build_network(0).eval()
        with torch.no_grad():  # sharper attention than that of fresh weights, so that a leak shows
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(20)
        alone = Qwen3ForCausalLM._from_config(tiny_config(), attn_implementation="eager", dtype=torch.float32).eval()
        alone.load_state_dict(model.state_dict())
        four = [(ids[:cut], labels[:cut]) for (ids, labels), cut in zip(documents(4), (400, 90, 7, 1), strict=True)]
        tokens = sum(len(ids) for ids, _ in four) + 20
        batch = pack(four, tokens, 8)
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens")}
            packed = model(**inputs).logits[0]
            begin = 0
            for ids, _ in four:
                expected = alone(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
                torch.testing.assert_close(packed[begin : begin + len(ids)], expected, rtol=1e-4, atol=1e-4)
                begin += len(ids)
        assert packed.shape == (tokens, len(VOCABULARY))

    def test_seed_decides_the_weights(self, tiny):
        first, again, other = (network.build_network(seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
        assert {tensor.dtype for tensor in first.values()} == {torch.float32}

    def test_size(self):
        with torch.device("meta"):
            model = Qwen3ForCausalLM(network.build_config())
        assert sum(parameter.numel() for parameter in model.parameters()) == 12_709_504


@pytest.fixture
def options(tiny) -> TrainingOptions:
    """Of a training that takes a second."""
    return TrainingOptions(
        tokens=1024 * 6 - 5,
        batch_tokens=1024,
        slots=5,
        learning_rate=1e-2,
        warmup=2,
        workers=0,
        evaluate_every=2,
        held_out=3,
    )


class TestOptions:
    def test_rate(self):
        options = TrainingOptions(tokens=100 * 32_768, learning_rate=0.5, warmup=10)
        assert options.steps == 100
        rates = [options.rate(step) for step in range(100)]
        assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
        assert rates[10] == 0.5
        assert rates[55] == pytest.approx(0.25)
        assert all(before > after for before, after in pairwise(rates[10:]))
        assert 0 < rates[99] < 0.001
        assert options.rate(100) == pytest.approx(0)
        assert replace(options, warmup=0).rate(0) == 0.5
        assert [replace(options, warmup=200).rate(n) for n in (0, 99)] == pytest.approx([0.0025, 0.25])

    def test_steps_are_rounded_up(self):
        assert TrainingOptions(tokens=1).steps == 1
        assert TrainingOptions(tokens=32_768 * 2 + 1).steps == 3

    @pytest.mark.parametrize(
        ("name", "value", "line"),
        [
            ("tokens", 0, "tokens=0: must be above 0"),
            ("learning_rate", -1.0, "learning_rate=-1.0: must be above 0"),
            ("clip", 0.0, "clip=0.0: must be above 0"),
            ("evaluate_every", 0, "evaluate_every=0: must be above 0"),
            ("held_out", 0, "held_out=0: must be above 0"),
            ("warmup", -1, "warmup=-1: must be at least 0"),
            ("weight_decay", -0.1, "weight_decay=-0.1: must be at least 0"),
            ("workers", -1, "workers=-1: must be at least 0"),
            ("batch_tokens", 4096, "batch_tokens=4096: must hold the longest document, 9216 tokens"),
            ("slots", 1, "slots=1: must be at least 2"),
        ],
    )
    def test_wrong_options(self, name, value, line, tmp_path, capsys):
        with pytest.raises(ValueError, match=line):
            TrainingOptions(**{name: value})
        out = tmp_path / "model"
        assert train_reasoner.main(["--out", str(out), "--device", "cpu", f"--{name.replace('_', '-')}={value}"]) == 2
        assert capsys.readouterr().err == f"error: {line}\n"
        assert not out.exists()


class TestTraining:
    def test_whole_training(self, options, tmp_path, capsys):
        out = tmp_path / "model"
        record = training.train(options, out, "cpu")
        assert record == json.loads((out / "training.json").read_text())
        assert record["options"] == vars(options)
        assert record["provenance"]["code"].keys() == {"commit", "diff"}
        assert record["provenance"]["started"] <= record["provenance"]["ended"]
        assert [row["step"] for row in record["curve"]] == [2, 4, 6]
        assert [row["tokens"] for row in record["curve"]] == [2048, 4096, 6144]
        losses = [row["loss"] for row in record["curve"]]
        assert losses[0] == pytest.approx(math.log(len(VOCABULARY)), abs=0.5)
        assert losses[2] < losses[1] < losses[0]
        assert all(row[name] == 0.0 for row in record["curve"] for name in training.FAMILIES)
        assert capsys.readouterr().out.count("\n") == 3

        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == torch.bfloat16
        assert model.config.use_cache
        assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        tokenizer = AutoTokenizer.from_pretrained(out)
        prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt)["input_ids"]
        llm = LLM(str(out), device="cpu", num_blocks=64, block_size=16, dtype="float32")
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        answer = llm.generate([ids], params, use_tqdm=False)[0].outputs[0]
        assert answer.token_ids == transformers_greedy(model.float(), ids, 12)[0]

    def test_same_seed_same_losses(self, options, tmp_path):
        curves = []
        for number, seed in enumerate((0, 0, 1)):
            record = training.train(replace(options, seed=seed, tokens=3072), tmp_path / str(number), "cpu")
            curves.append([row["loss"] for row in record["curve"]])
        assert curves[0] == curves[1]
        assert curves[0][0] != curves[2][0]

    def test_loss_that_is_no_number_is_an_error(self, options, tmp_path, monkeypatch):
        def broken(seed):
            model = network.build_network(seed)
            with torch.no_grad():
                model.lm_head.weight[7, 3] = math.nan
            return model

        monkeypatch.setattr(training, "build_network", broken)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 2: lower learning_rate"):
            training.train(options, tmp_path / "model", "cpu")
        assert not (tmp_path / "model" / "model.safetensors").exists()
        # On the command line, one line.
        asked = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()]
        assert train_reasoner.main(["--out", str(tmp_path / "model"), "--device", "cpu", *asked]) == 1

    def test_held_out_share_counts_whole_documents(self, options):
        batches = list(training._packed_held_out("chained_arithmetic", replace(options, held_out=7)))
        assert sum(count for _, count in batches) == 7
        assert len(batches) > 1
        by_text = {bytes(ids): labels for ids, labels in map(to_document, held_out("chained_arithmetic", 7))}
        assert len(by_text) == 7

        def oracle(wrong_documents):
            """Logits that are right but for one answer token of the documents of these numbers."""

            def predict(batch):
                labels = batch["labels"][0].clone()
                for number in wrong_documents:
                    begin = int(batch["cu_seq_lens"][number])
                    labels[begin + int((labels[begin:] != IGNORED).nonzero()[5])] ^= 1
                return torch.nn.functional.one_hot(labels.clamp(min=0), len(VOCABULARY)).float()

            return predict

        assert training._exact(oracle([]), batches, "cpu") == 1
        assert training._exact(oracle([0]), batches, "cpu") == pytest.approx(1 - len(batches) / 7)

    def test_evaluations_ask_what_is_held_out(self):
        for family in training.FAMILIES:
            problems = list(held_out(family, 5))
            assert problems == list(GENERATORS[family](seed=training.HELD_OUT_SEED, count=5, split="held_out"))

    def test_matrices_decay_and_norms_do_not(self, tiny):
        model = network.build_network(0)
        matrices, norms = training._groups(model, 0.3)
        assert (matrices["weight_decay"], norms["weight_decay"]) == (0.3, 0.0)
        assert {p.ndim for p in matrices["params"]} == {2}
        assert {p.ndim for p in norms["params"]} == {1}
        assert len(matrices["params"]) + len(norms["params"]) == len(list(model.parameters()))


def held_out(family: str, count: int):
    return training.held_out_problems(family, count)


class TestShippedModel:
    def test_weights_are_small(self):
        path = REASONER / "model.safetensors"
        assert path.stat().st_size <= 30_000_000
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            assert {tensor.get_dtype() for tensor in tensors.values()} == {"BF16"}
            assert sum(math.prod(tensor.get_shape()) for tensor in tensors.values()) == 12_709_504

    def test_config_is_the_one_built(self):
        found = json.loads((REASONER / "config.json").read_text())
        built = json.loads(network.build_config().to_json_string(use_diff=False))
        ours = ("architectures", "dtype", "use_cache", "transformers_version")
        assert {k: v for k, v in found.items() if k not in ours}.items() <= built.items()
        assert found["architectures"] == ["Qwen3ForCausalLM"]
        assert found["dtype"] == "bfloat16"
        assert found["use_cache"]

    def test_record_of_the_training(self):
        record = json.loads((REASONER / "training.json").read_text())
        options = TrainingOptions(**record["options"])
        assert record["parameters"] == 12_709_504
        assert len(record["provenance"]["code"]["commit"]) == 40
        assert record["provenance"]["hardware"]["gpus"]
        steps = [row["step"] for row in record["curve"]]
        assert steps == sorted(steps)
        assert steps[-1] == options.steps
        last = record["curve"][-1]
        assert last["loss"] < 0.01
        for family in training.FAMILIES:
            assert last[family] > 0.85
