"""gpt-oss (arXiv:2508.10925): attention sinks, a window in every other layer, and experts with biases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zipage.models.attention import AttentionSpec
from zipage.models.expert_spec import ExpertSpec
from zipage.models.family import Family, by_layer_type
from zipage.models.fields import FULL, SLIDING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias={config.mlp_bias!r} is not supported with {config.model_type}")
    experts = ExpertSpec(
        num_experts=config.num_local_experts,
        num_active=config.num_experts_per_tok,
        width=config.intermediate_size,
        normalized=True,
        swiglu=(getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)),
    )
    bias = bool(config.attention_bias)
    return {"qkv_bias": bias, "output_bias": bias, "experts": experts}


def _attention(config: PretrainedConfig, full: AttentionSpec) -> tuple[AttentionSpec, ...]:
    return by_layer_type(config, replace(full, sinks=True))


def _gguf_config(fields: dict[str, Any]) -> dict[str, Any]:
    """YaRN's bounds are not rounded to whole dimensions, which files do not say."""
    return fields | {"rope_parameters": fields["rope_parameters"] | {"truncate": False}}


GPT_OSS = Family(
    name="gpt_oss",
    checkpoint_class="GptOssForCausalLM",
    config_class="GptOssConfig",
    flags=_flags,
    layer_types=(FULL, SLIDING),
    quantization=("mxfp4",),
    sparse=True,
    attention=_attention,
    gguf_architecture="gpt-oss",
    gguf_keys={
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
    gguf_names={
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
        "post_attention_norm": "post_attention_layernorm",
    },
    gguf_config=_gguf_config,
)
