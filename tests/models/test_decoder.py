"""Logits against transformers, for every family, flag and rope type, through files on disk."""

import pytest
import torch

from tests.models.dense import dense_attention, dense_attention_of, dense_recurrence_of
from tests.models.tiny import (
    GEMMA,
    GPT_OSS,
    HYBRID,
    LENGTH,
    MIXTURE,
    PHI,
    ROPE,
    make_model,
    reference_logits,
    token_ids,
)
from zipage.models.loading.loader import load_model

CASES = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied-biased": (
        "Llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-head-dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "llama-linear": ("Llama", {"rope_parameters": ROPE["linear"]}),
    "llama-llama3": ("Llama", {"rope_parameters": ROPE["llama3"]}),
    "llama-yarn": ("Llama", {"rope_parameters": ROPE["yarn"]}),
    "llama-yarn-options": (
        "Llama",
        {"rope_parameters": ROPE["yarn"] | {"attention_factor": 1.3, "beta_fast": 16.0, "truncate": False}},
    ),
    "qwen2-gqa-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": ROPE["default"]}),
    "qwen2-mha-yarn": ("Qwen2", {"num_key_value_heads": 4, "rope_parameters": ROPE["yarn"]}),
    "qwen3-head-dim": ("Qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen3-tied-biased": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral-gqa": ("Mistral", {"head_dim": 24, "sliding_window": LENGTH}),
    "phi3-mha-tied": ("Phi3", PHI | {"num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 256}),
    "phi3-whole-head": ("Phi3", PHI | {"partial_rotary_factor": 1.0}),
    "phi3-longrope-long": ("Phi3", PHI | {"rope_parameters": ROPE["longrope"]}),
    "qwen2-moe": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 40, "norm_topk_prob": True}),
    "qwen2-moe-no-bias": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 20, "qkv_bias": False}),
    "qwen3-moe": ("Qwen3Moe", MIXTURE | {"head_dim": 32, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-moe-some-layers": ("Qwen3Moe", MIXTURE | {"decoder_sparse_step": 2, "moe_intermediate_size": 20}),
    "gemma3-tied": ("Gemma3Text", GEMMA | {"final_logit_softcapping": 20.0}),
    "gemma3-biased-linear": (
        "Gemma3Text",
        GEMMA
        | {
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": ROPE["linear"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "gemma3-no-window": ("Gemma3Text", GEMMA | {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 1}),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss-clamped": (
        "GptOss",
        GPT_OSS | {"swiglu_limit": 0.5, "swiglu_alpha": 1.3, "attention_bias": False, "num_experts_per_tok": 3},
    ),
    "gpt-oss-default-rope-tied": (
        "GptOss",
        GPT_OSS | {"rope_parameters": ROPE["default"], "tie_word_embeddings": True, "head_dim": 16},
    ),
    "qwen3-next": ("Qwen3Next", HYBRID | MIXTURE | {"shared_expert_intermediate_size": 40, "num_hidden_layers": 4}),
    "qwen3-next-dense-biased": ("Qwen3Next", HYBRID | {"num_experts": 0, "attention_bias": True}),
    "qwen3-next-some-layers": (
        "Qwen3Next",
        HYBRID
        | MIXTURE
        | {
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 20,
            "linear_conv_kernel_dim": 2,
            "partial_rotary_factor": 1.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-next-attention-alone": ("Qwen3Next", HYBRID | {"full_attention_interval": 1, "num_experts": 0}),
    "qwen3.5": ("Qwen3_5Text", HYBRID | {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "qwen3.5-of-images": (
        "Qwen3_5Text",
        HYBRID
        | {
            "head_dim": 32,
            "linear_num_value_heads": 2,
            "rope_parameters": ROPE["default"]
            | {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
    ),
    "qwen3.5-moe": ("Qwen3_5MoeText", HYBRID | MIXTURE | {"shared_expert_intermediate_size": 40}),
    "qwen3.5-moe-of-images": (
        "Qwen3_5MoeText",
        HYBRID
        | MIXTURE
        | {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 20,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE["default"]
            | {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
    ),
    "qwen3-moe-window": ("Qwen3Moe", MIXTURE | {"use_sliding_window": True, "sliding_window": LENGTH}),
}


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    family, options = CASES[case]
    reference = make_model(family, **options)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = token_ids()
    decoder = load_model(str(tmp_path), device="cpu").decoder
    hidden = decoder(ids, torch.arange(LENGTH), dense_attention_of(decoder), recurrence=dense_recurrence_of(decoder))
    assert hidden.shape == (LENGTH, 64)
    assert max_error(decoder.logits(hidden), reference_logits(reference, ids)) < 1e-5


def test_positions_are_the_callers(tmp_path):
    """Rotary depends on the distance alone, and each token's position is the one given."""
    make_model("Llama").save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), device="cpu").decoder
    ids, positions = token_ids(), torch.arange(LENGTH)
    hidden = decoder(ids, positions, dense_attention)
    shifted = decoder(ids, positions + 1000, dense_attention)
    spread = decoder(ids, positions * 3, dense_attention)
    assert max_error(shifted, hidden) < 1e-4
    assert max_error(spread, hidden) > 1e-2


def test_attention_is_called_once_a_layer_with_rotated_heads(tmp_path):
    make_model("Qwen3", head_dim=32).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    calls = []

    def attention(layer, q, k, v):
        calls.append((layer, q.shape, k.shape, v.shape))
        assert all(tensor.stride()[1:] == (32, 1) for tensor in (q, k, v))
        return dense_attention(layer, q, k, v)

    loaded.decoder(token_ids(length=5), torch.arange(5), attention)
    assert calls == [(layer, (5, 4, 32), (5, 2, 32), (5, 2, 32)) for layer in range(3)]


def test_rotary_is_that_of_the_longest_context(tmp_path):
    """As transformers' own for a text of that length, beyond which it takes others for all its tokens."""
    reference = make_model("Phi3", **PHI, rope_parameters=ROPE["longrope"])
    reference.save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), device="cpu").decoder
    short = decoder.for_context(32)
    assert decoder.for_context(33) is decoder
    assert short.for_context(32) is not decoder
    assert all(a is b for a, b in zip(short.parameters(), decoder.parameters(), strict=True))
    for of_context, length in ((short, 32), (decoder, 33), (decoder, LENGTH)):
        ids = token_ids(length=length)
        logits = of_context.logits(of_context(ids, torch.arange(length), dense_attention))
        assert max_error(logits, reference_logits(reference, ids)) < 1e-5, length


def test_attention_scores_are_capped(tmp_path):
    """transformers' Gemma 3 caps them where its caller says so, and leaves the config's cap out."""
    reference = make_model("Gemma3Text", gain=2.0, **GEMMA, attn_logit_softcapping=3.0)
    reference.save_pretrained(tmp_path)
    reference.set_attn_implementation("eager")
    ids = token_ids()
    decoder = load_model(str(tmp_path), device="cpu").decoder
    logits = decoder.logits(decoder(ids, torch.arange(LENGTH), dense_attention_of(decoder)))
    with torch.no_grad():
        expected = reference(ids[None], softcap=3.0).logits[0]
    assert max_error(logits, expected) < 1e-5
    assert max_error(logits, reference_logits(reference, ids)) > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Qwen2Moe", "Qwen3Moe"])
def test_bfloat16_stays_near_float32(family, tmp_path):
    reference = make_model(family)
    reference.save_pretrained(tmp_path)
    ids = token_ids()
    decoder = load_model(str(tmp_path), device="cpu", dtype="bfloat16").decoder
    logits = decoder.logits(decoder(ids, torch.arange(LENGTH), dense_attention))
    assert logits.dtype == decoder.dtype == torch.bfloat16
    assert max_error(logits.float(), reference_logits(reference, ids)) < 0.05


@pytest.mark.parametrize(("family", "options"), [("Gemma3Text", GEMMA), ("GptOss", GPT_OSS)])
def test_bfloat16_is_as_near_as_that_of_transformers(family, options, tmp_path):
    """Of models whose random attention is sharp, or whose random router is often undecided."""
    reference = make_model(family, **options)
    reference.save_pretrained(tmp_path)
    ids = token_ids()
    expected = reference_logits(reference, ids)
    decoder = load_model(str(tmp_path), device="cpu", dtype="bfloat16").decoder
    logits = decoder.logits(decoder(ids, torch.arange(LENGTH), dense_attention_of(decoder)))
    theirs = reference_logits(reference.bfloat16(), ids)
    assert (logits - expected).norm() < 1.5 * (theirs - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    "case",
    [
        "llama-mha-tied-biased",
        "phi3-longrope-long",
        "qwen2-moe",
        "qwen3-moe-some-layers",
        "gemma3-biased-linear",
        "gpt-oss",
    ],
)
def test_parameters_take_no_gradient_and_views_cover_them(case, tmp_path):
    family, options = CASES[case]
    make_model(family, **options).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), device="cpu").decoder
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    with torch.no_grad():
        for view in decoder.weight_views().values():
            view.fill_(7.0)
    assert all((parameter == 7.0).all() for parameter in decoder.parameters())
    views = decoder.weight_views().values()
    assert sum(view.numel() for view in views) == sum(parameter.numel() for parameter in decoder.parameters())
