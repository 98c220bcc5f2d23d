"""Gemma 3 (arXiv:2503.19786), of text alone: layers with a window between full ones, and norms before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zipage.models.attention import AttentionSpec
from zipage.models.family import Family, by_layer_type
from zipage.models.fields import FULL, SLIDING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS_OF_27B = 62


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation={config.hidden_activation!r} is not supported; only gelu_pytorch_tanh")
    if config.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention=True is not supported: a decoder looks back alone")
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias={config.mlp_bias!r} is not supported with {config.model_type}")
    bias = bool(config.attention_bias)
    return {
        "activation": "gelu_tanh",
        "embedding_scale": config.hidden_size**0.5,
        "logit_cap": config.final_logit_softcapping,
        "norm_offset": 1.0,
        "output_bias": bias,
        "output_norms": True,
        "qk_norm": True,
        "qkv_bias": bias,
    }


def _attention(config: PretrainedConfig, full: AttentionSpec) -> tuple[AttentionSpec, ...]:
    """transformers reads `attn_logit_softcapping` and leaves it out; no published model has it."""
    if not config.query_pre_attn_scalar > 0:
        raise ValueError(f"query_pre_attn_scalar={config.query_pre_attn_scalar!r}: must be above 0")
    scale = config.query_pre_attn_scalar**-0.5
    return by_layer_type(config, replace(full, scale=scale, soft_cap=config.attn_logit_softcapping))


def _rope(config: PretrainedConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Of full and of sliding layers. transformers ignores what is of neither, and a `type` beside its `rope_type`."""
    odd = sorted(config.rope_parameters.keys() - {FULL, SLIDING})
    if odd:
        raise ValueError(f"rope_parameters: {', '.join(odd)} must be in {FULL} or {SLIDING}")
    for kind in (FULL, SLIDING):
        parameters = config.rope_parameters[kind]
        if parameters.get("type", parameters["rope_type"]) != parameters["rope_type"]:
            raise ValueError(f"rope_scaling: type={parameters['type']!r} must be named rope_type")
    return config.rope_parameters[FULL], config.rope_parameters[SLIDING]


def _gguf_config(fields: dict[str, Any]) -> dict[str, Any]:
    """As llama.cpp takes what files do not say: each sixth layer is full, the others have the rotary base 10,000, and
    the largest model, which has 62 layers, has a scale of its own.
    """
    local = {"rope_type": "default", "rope_theta": fields.get("rope_local_base_freq", 10000.0)}
    whole = fields["num_hidden_layers"] == LAYERS_OF_27B
    more = {
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"]
        if whole
        else fields["head_dim"],
        "rope_parameters": {FULL: fields["rope_parameters"], SLIDING: local},
        "sliding_window_pattern": fields.get("sliding_window_pattern", 6) if fields["sliding_window"] else 1,
    }
    return {name: value for name, value in fields.items() if name != "rope_local_base_freq"} | more


GEMMA3_TEXT = Family(
    name="gemma3_text",
    checkpoint_class="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    flags=_flags,
    layer_types=(FULL, SLIDING),
    hidden_act=None,
    rope=_rope,
    stretches_positions=False,
    attention=_attention,
    gguf_architecture="gemma3",
    gguf_keys={
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    gguf_names={
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    gguf_config=_gguf_config,
)
