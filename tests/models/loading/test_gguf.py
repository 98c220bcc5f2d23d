"""GGUF files of tiny models against transformers with the same dequantized weights."""

import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.models.dense import dense_attention_of
from tests.models.loading.gguf_writer import write_gguf
from tests.models.tiny import GEMMA, GPT_OSS, LENGTH, MIXTURE, PHI, ROPE, make_model, reference_logits, token_ids
from zipage.models.loading.gguf_file import GgufFile
from zipage.models.loading.gguf_model import gguf_spec
from zipage.models.loading.loader import load_model

GEMMA3 = GEMMA | {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "num_hidden_layers": 7}
"""As llama.cpp takes it where a file does not say."""


def check_logits(path, model, weights):
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    expected = reference_logits(model, token_ids())
    decoder = load_model(str(path), device="cpu").decoder
    actual = decoder.logits(decoder(token_ids(), torch.arange(LENGTH), dense_attention_of(decoder)))
    assert (actual - expected).abs().max() < 3e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "options", "quantization"),
    [
        ("Llama", {"tie_word_embeddings": True}, Type.Q4_1),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, Type.F32),
        ("Llama", {}, Type.F16),
        ("Qwen2", {}, Type.Q8_0),
        ("Qwen2", {"tie_word_embeddings": True}, Type.BF16),
        ("Qwen3", {"head_dim": 32}, Type.Q8_0),
        ("Phi3", PHI | {"num_key_value_heads": 4}, Type.Q8_0),
        ("Phi3", PHI | {"rope_parameters": ROPE["longrope"], "sliding_window": 96}, Type.F32),
        ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 64}, Type.Q8_0),
        ("Qwen3Moe", MIXTURE | {"head_dim": 32, "norm_topk_prob": True}, Type.BF16),
        ("Gemma3Text", GEMMA3, Type.Q8_0),
        ("Gemma3Text", GEMMA3 | {"tie_word_embeddings": True, "final_logit_softcapping": 5.0}, Type.F32),
        ("GptOss", GPT_OSS, Type.MXFP4),
        ("GptOss", GPT_OSS, Type.F16),
    ],
)
def test_logits_equal_transformers(family, options, quantization, tmp_path):
    model = make_model(family, **options)
    path = tmp_path / "model.gguf"
    check_logits(path, model, write_gguf(path, model, quantization))


def test_llama3_scaling_comes_as_a_tensor(tmp_path):
    model = make_model("Llama", rope_parameters=ROPE["llama3"])
    plain = make_model("Llama", rope_parameters=ROPE["default"] | {"rope_theta": ROPE["llama3"]["rope_theta"]})
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    path = tmp_path / "model.gguf"
    weights = write_gguf(path, model, Type.F32, extra_tensors={"rope_freqs.weight": factors})
    check_logits(path, model, weights)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ("linear", {"type": "linear", "factor": 4.0}),
        ("yarn", {"type": "yarn", "factor": 4.0, "original_context_length": 32}),
    ],
)
def test_scaling_by_metadata(rope, keys, tmp_path):
    model = make_model("Qwen2", rope_parameters=ROPE[rope])
    path = tmp_path / "model.gguf"
    metadata = {f"qwen2.rope.scaling.{key}": value for key, value in keys.items()}
    check_logits(path, model, write_gguf(path, model, Type.F32, metadata))


def test_a_window_ends_the_contexts_of_a_file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Phi3", **PHI, sliding_window=96), Type.F32)
    assert gguf_spec(GgufFile(path)).max_position == 96


@pytest.mark.parametrize(
    ("tokens", "template", "ends"),
    [
        (["a", "<eos>", "b", "<end_of_turn>"], "<start_of_turn>{{ messages }}<end_of_turn>", (2, 3)),
        (["<|return|>", "<|call|>", "b", "<|end|>"], "<|end|>{{ messages }}<|call|>, <|return|>", (0, 1, 2)),
    ],
)
def test_ends_of_a_turn(tokens, template, ends, tmp_path):
    """Beside the end of sequence, 2. gpt-oss ends each of its messages by <|end|>, and no turn."""
    path = tmp_path / "model.gguf"
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.chat_template": template}
    write_gguf(path, make_model("Qwen2"), Type.F32, metadata)
    assert gguf_spec(GgufFile(path)).eos_token_ids == ends


@pytest.mark.parametrize(
    ("metadata", "num_full", "local_base"),
    [
        ({}, 1, 10000.0),
        ({"gemma3.attention.sliding_window_pattern": 2}, 3, 10000.0),
        ({"gemma3.attention.sliding_window": 0, "gemma3.rope.freq_base_swa": 5000.0}, 7, 5000.0),
        ({"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, 1, 10000.0),
    ],
)
def test_layers_of_gemma(metadata, num_full, local_base, tmp_path):
    """Linear scaling is of full layers alone."""
    model = make_model("Gemma3Text", **GEMMA3)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, Type.F32, metadata)
    spec = gguf_spec(GgufFile(path))
    full = [index for index, layer in enumerate(spec.attention) if layer.window is None]
    assert len(full) == num_full
    assert {layer.window for layer in spec.attention} - {None} == ({24} if num_full < 7 else set())
    assert {layer.scale for layer in spec.attention} == {32**-0.5}
    assert spec.local_inv_freq[1] == pytest.approx(local_base ** (-1 / 16))
    theta = model.config.rope_parameters["full_attention"]["rope_theta"]
    assert spec.inv_freq[1] == pytest.approx(theta ** (-1 / 16) / metadata.get("gemma3.rope.scaling.factor", 1.0))


def test_the_largest_gemma_has_a_scale_of_its_own(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Gemma3Text", **GEMMA3 | {"num_hidden_layers": 62}), Type.Q4_0)
    assert gguf_spec(GgufFile(path)).attention[0].scale == 16**-0.5  # width 64, 4 heads of 32


def test_experts_without_their_other_half(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("GptOss", **GPT_OSS), Type.Q8_0, leave_out="blk.1.ffn_gate_exps.weight")
    with pytest.raises(
        ValueError, match=r"missing: \S+1\.mlp\.experts\.gate_up_proj; left over: \S+1\.mlp\.experts\.0\.up"
    ):
        load_model(str(path), device="cpu")


def test_an_exponent_that_is_none_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("GptOss", **GPT_OSS), Type.MXFP4)
    content = bytearray(path.read_bytes())
    content[GgufFile(path).tensors["blk.1.ffn_up_exps.weight"].offset + 17 * 5] = 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up_exps\.weight has a scale of 255, which is no exponent"):
        load_model(str(path), device="cpu")


def test_a_quantized_norm_is_named(tmp_path):
    path, name = tmp_path / "model.gguf", b"output_norm.weight"
    write_gguf(path, make_model("Llama"), Type.F32)
    data = bytearray(path.read_bytes())
    place = data.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the only one
    data[place] = Type.Q4_0
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"tensor output_norm\.weight has no rows to be quantized in: convert the file"
    ):
        load_model(str(path), device="cpu")


def test_spec_and_dummy(tmp_path):
    model = make_model("Qwen2", tie_word_embeddings=True)
    path = tmp_path / "model.gguf"
    metadata = {
        "tokenizer.ggml.tokens": ["a", "b", "c", "<|im_end|>", "<|eot_id|>", "d"],
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.chat_template": "<|im_start|>{{ messages }}<|im_end|>",
    }
    write_gguf(path, model, Type.Q8_0, metadata)
    spec = gguf_spec(GgufFile(path))
    assert (spec.architecture, spec.num_layers, spec.vocab_size, spec.tie_embeddings) == ("qwen2", 3, 160, True)
    assert spec.eos_token_ids == (2, 3, 5)
    assert spec.dtype is torch.bfloat16
    assert load_model(str(path), load_format="dummy", device="cpu").spec == spec


def test_missing_and_left_over_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)}
    write_gguf(path, make_model("Llama"), Type.F32, extra_tensors=extra, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj.*left over: blk\.0\.attn_sinks"):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.sliding_window": 16}, r"llama\.attention\.sliding_window is not supported"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is not supported"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8, not the head dimension 16"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
        ({"split.count": 2}, "one part of a split GGUF"),
    ],
)
def test_metadata_that_is_not_supported(metadata, message, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Llama"), Type.F32, metadata)
    with pytest.raises(ValueError, match=message):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize("architecture", ["gemma", "gemma2"])
def test_an_architecture_that_is_not_supported(architecture, tmp_path):
    """Families without GGUF are not in the list of what is."""
    path = tmp_path / "model.gguf"
    model = make_model("Llama")
    model.config.model_type = architecture
    write_gguf(path, model, Type.F32)
    supported = "llama, mistral, phi3, qwen2, qwen2moe, qwen3, qwen3moe, gemma3, gpt-oss"
    message = rf"model\.gguf: unknown architecture '{architecture}'; supported in GGUF: {supported}$"
    with pytest.raises(ValueError, match=message):
        load_model(str(path), device="cpu")


def test_broken_files(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Llama"), Type.Q8_0)
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=r"ends before tensor \S+ does"):
        load_model(str(path), device="cpu")
    for length in (4, 20, 300, 1000):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="broken GGUF header"):
            GgufFile(path)
    path.write_bytes(data[:4] + b"\x00\x00\x00\x03" + data[8:])
    with pytest.raises(ValueError, match="version 50331648 or big-endian"):
        GgufFile(path)
    path.write_bytes(b"PK" + data[2:])
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GgufFile(path)


@pytest.mark.parametrize("quantization", [Type.Q8_0, Type.F16, Type.F32])
def test_a_weight_that_is_not_finite_is_named(quantization, tmp_path):
    """A quantized block's scale among them."""
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Qwen2"), quantization)
    file = GgufFile(path)
    content = bytearray(path.read_bytes())
    offset = file.tensors["blk.1.ffn_down.weight"].offset
    content[offset : offset + 4] = b"\0\0\xc0\x7f" if quantization is Type.F32 else b"\0\x7e\0\0"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf: model\.layers\.1\.mlp\.down_proj\.weight holds nan"):
        load_model(str(path), device="cpu")


def test_without_the_package_gguf_only_quantized_files_fail(tmp_path, monkeypatch):
    plain, quantized = tmp_path / "plain.gguf", tmp_path / "quantized.gguf"
    write_gguf(plain, make_model("Llama"), Type.F16)
    write_gguf(quantized, make_model("Llama"), Type.Q8_0)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    load_model(str(plain), device="cpu")
    with pytest.raises(ImportError, match=r"quantized\.gguf is quantized, which takes the package gguf: pip install"):
        load_model(str(quantized), device="cpu")
