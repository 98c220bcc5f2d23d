import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.models.tiny import COMMON, PHI, ROPE
from zipage.models.expert_spec import ExpertSpec
from zipage.models.families.gpt_oss import GPT_OSS
from zipage.models.loading.hf_config import hf_config, read_spec, spec_from_config
from zipage.models.quantization import Quantization
from zipage.models.spec import ModelSpec

EVERY_OTHER = {"full_attention_interval": 2}


def spec_of(model_type: str, **options) -> ModelSpec:
    return spec_from_config(hf_config(COMMON | {"model_type": model_type} | options))


def test_llama():
    spec = spec_from_config(LlamaConfig(**COMMON, dtype="bfloat16"), eos_token_ids=(9, 5))
    assert (spec.num_layers, spec.width, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 64, 4, 2, 16)
    assert (spec.mlp_width, spec.vocab_size, spec.max_position, spec.dtype) == (96, 160, 128, torch.bfloat16)
    assert not any((spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm, spec.tie_embeddings))
    assert spec.eos_token_ids == (2, 5, 9)
    assert len(spec.inv_freq) == 8
    assert hash(spec)


def test_flags_of_the_families():
    qwen2 = spec_from_config(Qwen2Config(**COMMON))
    assert qwen2.qkv_bias
    assert not any((qwen2.output_bias, qwen2.qk_norm))
    qwen3 = spec_from_config(Qwen3Config(**COMMON, head_dim=32, attention_bias=True))
    assert qwen3.qk_norm
    assert qwen3.qkv_bias
    assert qwen3.output_bias
    assert qwen3.head_dim == 32
    llama = spec_of("llama", attention_bias=True, mlp_bias=True)
    assert llama.qkv_bias
    assert llama.output_bias
    assert llama.mlp_bias


def test_a_mixture_need_not_say_how_wide_the_mlp_is_that_it_lacks():
    """transformers' config of Qwen3.5's mixtures has no such field, and neither have the published ones."""
    published = {name: value for name, value in COMMON.items() if name != "intermediate_size"}
    spec = spec_from_config(
        hf_config(published | {"model_type": "qwen3_5_moe_text", "layer_types": ["full_attention"] * 3})
    )
    assert (spec.experts.num_experts, spec.experts.dense_layers) == (256, ())


def test_a_config_of_the_old_form_reads_like_the_new():
    old = spec_of("llama", rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 4.0}, torch_dtype="float16")
    new = spec_of("llama", rope_parameters=ROPE["linear"] | {"rope_theta": 500000.0}, dtype="float16")
    assert old == new


def test_scaling_stretches_the_longest_position():
    assert spec_of("llama", rope_parameters=ROPE["linear"]).max_position == 512
    assert spec_of("llama", rope_parameters=ROPE["yarn"]).max_position == 128
    assert spec_of("qwen2", rope_parameters=ROPE["yarn"] | {"factor": 8.0}).max_position == 256
    assert spec_of("llama", rope_parameters=ROPE["llama3"]).max_position == 128


def test_contexts_end_where_the_window_of_all_layers_does(caplog):
    assert spec_of("mistral", sliding_window=64).max_position == 64
    assert "contexts end at 64 tokens" in caplog.text
    caplog.clear()
    assert spec_of("mistral", sliding_window=None).max_position == 128
    assert spec_of("phi3", sliding_window=262144).max_position == 128
    assert "window" not in caplog.text


def test_longrope():
    spec = spec_of("phi3", **PHI, rope_scaling=ROPE["longrope"] | {"rope_type": "su"})
    assert len(spec.inv_freq) == len(spec.long_inv_freq) == 6
    assert spec.frequencies(32) == spec.inv_freq
    assert spec.frequencies(33) == spec.long_inv_freq
    assert spec.inv_freq[5] / spec.long_inv_freq[5] == pytest.approx(8 / 1.5)
    assert spec.rope_attention_factor == pytest.approx((1 + math.log(4) / math.log(32)) ** 0.5)


def test_which_layers_have_experts():
    options = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
    spec = spec_of("qwen3_moe", **options, norm_topk_prob=True)
    assert spec.experts == ExpertSpec(num_experts=8, num_active=3, width=32, normalized=True)
    assert spec.experts_of(2) is spec.experts
    assert spec.mlp_widths() == {"the experts'": 32}
    spec = spec_of("qwen2_moe", **options, decoder_sparse_step=2, shared_expert_intermediate_size=40)
    assert spec.experts.dense_layers == (0, 2)
    assert spec.experts_of(2) is None
    assert spec.mlp_widths() == {"the MLP's": 96, "the experts'": 32, "the shared expert's": 40}
    assert spec_of("qwen3_moe", **options, mlp_only_layers=[1]).experts.dense_layers == (1,)


def test_the_number_of_active_experts_is_never_that_of_some_other_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(COMMON | {"model_type": "qwen3_moe"}))
    with pytest.raises(ValueError, match=r"config\.json: num_experts_per_tok is missing"):
        read_spec(tmp_path)


def test_gemma3_in_the_form_of_the_hub():
    """As google/gemma-3-4b-it's text: its positions are counted after scaling, and its window has a base of its own."""
    scaled = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 10_000, "rope_scaling": scaled, "sliding_window_pattern": 3}
    spec = spec_of("gemma3_text", head_dim=16, sliding_window=32, query_pre_attn_scalar=64, **old)
    assert [layer.window for layer in spec.attention] == [32, 32, None]
    assert {layer.scale for layer in spec.attention} == {0.125}
    assert spec.max_position == 128
    assert spec.inv_freq[1] == pytest.approx(1e6 ** (-1 / 8) / 8)
    assert spec.local_inv_freq[1] == pytest.approx(10_000 ** (-1 / 8))
    assert spec.embedding_scale == 8.0
    assert spec.tie_embeddings


def test_gpt_oss_in_the_form_of_the_hub():
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    rope = {"rope_theta": 150_000, "rope_scaling": yarn | {"original_max_position_embeddings": 4}}
    packed = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0}
    spec = spec_of("gpt_oss", head_dim=16, sliding_window=8, attention_bias=True, **experts, **rope, **packed)
    assert [layer.window for layer in spec.attention] == [8, None, 8]
    assert all(layer.sinks for layer in spec.attention)
    assert spec.experts == ExpertSpec(num_experts=4, num_active=2, width=96, normalized=True, swiglu=(1.702, 7.0))
    assert spec.quantization == Quantization("mxfp4")
    assert spec.qkv_bias
    assert spec.output_bias
    assert spec.max_position == 128


def test_full_layers_are_told_from_sliding_ones():
    def spec(kinds: str) -> ModelSpec:
        types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
        return spec_of("gpt_oss", num_hidden_layers=len(kinds), layer_types=types, sliding_window=8)

    for kinds, sliding in (("sfsf", (0, 2)), ("ffsf", (2,)), ("ssfssfs", (0, 1, 3, 4, 6)), ("ff", ())):
        found = spec(kinds)
        assert found.sliding_layers == sliding
        assert sorted((*found.full_layers, *sliding)) == list(range(len(kinds)))
        assert (found.full.num_layers, found.full.sliding_window) == (len(found.full_layers), 0)
        assert found.sliding_window == (8 if sliding else 0)
    assert spec("ss").sliding_layers == (), "their cache is that of full layers"
    assert len(spec("ss").full_layers) == 2


def test_windows_that_reach_no_layer_are_no_windows():
    assert spec_of("qwen2", use_sliding_window=True, max_window_layers=3).num_layers == 3


def test_layers_of_a_hybrid():
    """As Qwen3-Next's config says it, of the old form."""
    spec = spec_of("qwen3_next", num_hidden_layers=8, head_dim=64, partial_rotary_factor=0.5, rope_theta=1e7)
    assert spec.recurrent.layers == (0, 1, 2, 4, 5, 6)
    assert (spec.num_layers, spec.depth) == (2, 8)
    assert all(layer.output_gate for layer in spec.attention)
    assert len(spec.inv_freq) == 16
    assert spec.experts.shared_width == 512
    assert spec.experts_of(7) is spec.experts
    types = (["linear_attention"] * 3 + ["full_attention"]) * 2
    rope = ROPE["default"] | {"partial_rotary_factor": 0.5, "rope_theta": 1e7}
    same = spec_of("qwen3_next", num_hidden_layers=8, layer_types=types, head_dim=64, rope_parameters=rope)
    assert spec == same
    plain = spec_of("qwen3_5_text", full_attention_interval=1)
    assert (plain.recurrent, plain.depth, plain.attention[0].output_gate) == (None, 3, True)
    assert spec.token_operations > spec_of("qwen3_next", num_hidden_layers=4, head_dim=64).token_operations


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("gemma2", {}, r"'gemma2'; supported: llama, mistral, phi3, qwen2, qwen2_moe, qwen3"),
        ("gemma3", {}, "architecture 'gemma3' is not supported: it reads images; 'gemma3_text' is supported"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification; supported"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*supported: default"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, "odd"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ("llama", {"sliding_window": 16}, "sliding_window=16"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("llama", {"num_hidden_layers": 0}, "num_layers=0"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window must be false"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, "num_active=5: there are 4 experts"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts=0: must be an integer, at least 1"),
        ("qwen3_moe", {"num_experts": 2**20}, "num_experts=1048576: must be an integer, at most 4096"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be an integer, at least 1"),
        ("qwen3_moe", {"mlp_only_layers": [0, "a"]}, "mlp_only_layers=.*: must be a list of integers"),
        ("qwen2_moe", {"shared_expert_intermediate_size": -1}, "shared_width=-1: must be an integer, at least 1"),
        ("mistral", {"attention_bias": True}, "attention_bias=True is not supported with mistral"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0: must be an integer, at least 1"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0: must be above 0"),
        ("gemma3_text", {"final_logit_softcapping": -1.0}, "logit_cap=-1.0: must be a finite number above 0"),
        ("gemma3_text", {"attn_logit_softcapping": -1.0}, "soft_cap=-1.0: must be a finite number above 0"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window=None: must be an integer, at least 1"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma3_text", {"layer_types": ["odd"] * 3}, "layer_types"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"factor": "a"}}}, "rope_parameters=.*: must be"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": ROPE["yarn"]}},
            "rope_type='yarn' of sliding layers is not supported",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters: factor, .*rope_type.* must be in full_attention or sliding_attention",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: type='linear' must be named rope_type",
        ),
        ("qwen3_5", {}, "architecture 'qwen3_5' is not supported: it reads images; 'qwen3_5_text' is supported"),
        ("qwen3_5_moe", {}, "architecture 'qwen3_5_moe' is not supported: it reads images; 'qwen3_5_moe_text' is"),
        ("qwen3_5_moe_text", {**EVERY_OTHER, "num_experts_per_tok": 300}, "num_active=300: there are 256 experts"),
        ("qwen3_5_moe_text", {**EVERY_OTHER, "shared_expert_intermediate_size": -1}, "shared_width=-1: must be"),
        ("qwen3_next", {"mlp_bias": True}, "mlp_bias=True is not supported with qwen3_next"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, "layer_types has no full_attention"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval=0: must be an integer above 0"),
        ("qwen3_next", {**EVERY_OTHER, "linear_num_value_heads": 9}, "linear_num_value_heads=9 is not a multiple of"),
        ("qwen3_next", {**EVERY_OTHER, "linear_conv_kernel_dim": 0}, "taps=0: must be an integer, at least 1"),
        ("qwen3_next", {**EVERY_OTHER, "num_experts_per_tok": 600}, "num_active=600: there are 512 experts"),
        ("qwen3_5_text", {**EVERY_OTHER, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("gpt_oss", {"num_experts_per_tok": 5, "num_local_experts": 4}, "num_active=5: there are 4 experts"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0: must be a finite number above 0"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ("gpt_oss", {"sliding_window": 0}, "sliding_window=0: must be an integer, at least 1"),
        ("llama", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config \(mxfp4\)"),
        ("phi3", {"mlp_bias": True}, "mlp_bias=True is not supported with phi3"),
        ("phi3", {"partial_rotary_factor": 0.7}, "rotates 11 of 16 dimensions"),
        ("phi3", {"rope_parameters": ROPE["longrope"]}, "short_factor field must have length 8, got 6"),
        ("llama", {"rope_parameters": ROPE["longrope"]}, "short_factor: 6 factors, not 8"),
        ("phi3", {"rope_parameters": ROPE["longrope"] | {"short_factor": ["a"]}}, "rope_parameters=.*: must be"),
    ],
)
def test_what_is_not_supported_is_said(model_type, options, message):
    with pytest.raises(ValueError, match=message):
        spec_of(model_type, **options)


@pytest.mark.parametrize(
    ("model_type", "config", "why"),
    [
        ("deepseek_v2", DeepseekV2Config, "multi-head latent attention"),
        ("deepseek_v3", DeepseekV3Config, "multi-head latent attention"),
        ("kimi_k2", DeepseekV3Config, "multi-head latent attention"),
        ("mamba", MambaConfig, "recurrent layers"),
    ],
)
def test_architectures_that_can_not_be_say_why(tmp_path, model_type, config, why):
    """As published: DeepSeek-V3 in FP8, too."""
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    values = config().to_dict() | {"model_type": model_type, "quantization_config": fp8}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(
        ValueError, match=f"config.json: architecture '{model_type}' is not supported: it has {why}: "
    ) as caught:
        read_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_gives_its_generation_configs_ends(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(COMMON | {"model_type": "llama"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2, 7]}))
    assert read_spec(tmp_path).eos_token_ids == (2, 3, 7)


def test_errors_of_a_folder_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_spec(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"pass .*model\.gguf"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.json: unknown architecture 'gpt2'"):
        read_spec(tmp_path)


def test_gpt_oss_gates_its_experts_where_transformers_has_no_names_for_it():
    """GptOssConfig of transformers 5.17 keeps neither `swiglu_alpha` nor `swiglu_limit`."""
    config = SimpleNamespace(num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, attention_bias=True)
    assert GPT_OSS.flags(config)["experts"].swiglu == (1.702, 7.0)
