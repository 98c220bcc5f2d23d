"""Models in FP8 give the tokens of the weights that they mean."""

import pytest
import torch
import transformers.quantizers.quantizer_finegrained_fp8 as quantizer
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from tests.engine.compressed import greedy, make_llm, random_prompts, tokens_of
from tests.models.loading.fp8_writer import write_fp8
from tests.parallel.ranked import answers, engine
from tests.tiny_models import VOCAB, save_tiny_model, transformers_greedy

pytestmark = pytest.mark.usefixtures("forked_children")

NUM_TOKENS = 200
LAYERS = {"num_hidden_layers": 2}


def run(folder, prompts, **options) -> list[list[int]]:
    llm = make_llm(folder, None, max_num_batched_tokens=40, **options)
    tokens = tokens_of(llm.generate(prompts, greedy(NUM_TOKENS), use_tqdm=False))
    llm.shutdown()
    return tokens


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_tokens_of_the_dense_weights_and_of_transformers(family, tmp_path, monkeypatch):
    """In blocks that transformers can cut these shapes into; it asks for accelerate, which it does not use on a CPU."""
    block = (16, 32)
    folder = write_fp8(save_tiny_model(family, tmp_path / "plain", **LAYERS), tmp_path / "fp8", block)
    prompts = random_prompts((17, 70), VOCAB)
    expected = run(folder / "dense", prompts)
    assert min(len(set(tokens)) for tokens in expected) > 20, "a text that loops would agree with anything"
    assert run(folder, prompts) == expected
    assert run(tmp_path / "plain", prompts) != expected, "quantization changed nothing"
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    given = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=given).eval()
    assert [transformers_greedy(model, *each)[0] for each in zip(prompts, [NUM_TOKENS] * 2, expected)] == expected


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_blocks_that_do_not_fit_and_bfloat16(family, tmp_path):
    folder = write_fp8(
        save_tiny_model(family, tmp_path / "plain", **LAYERS), tmp_path / "fp8", (20, 24), torch.bfloat16
    )
    prompts = random_prompts((17, 70), VOCAB)
    for dtype in ("float32", "bfloat16"):
        assert run(folder, prompts, dtype=dtype) == run(folder / "dense", prompts, dtype=dtype)


def test_two_ranks_answer_as_one_device(tmp_path):
    """Blocks lie across the ranks' borders."""
    folder = write_fp8(save_tiny_model("qwen3_moe", tmp_path / "plain", **LAYERS), tmp_path / "fp8", (20, 24))
    one, two = engine(folder, None), engine(folder, None, tensor_parallel_size=2)
    expected, found = (answers(llm, max_tokens=40) for llm in (one, two))
    two.shutdown()
    assert not expected.differences(found)
