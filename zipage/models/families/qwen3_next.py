"""Qwen3-Next: gated DeltaNet between layers that attend, whose output has a gate; experts, one that all tokens take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zipage.models.attention import AttentionSpec
from zipage.models.delta_net_spec import DeltaNetSpec
from zipage.models.families.qwen3 import flags as qwen3_flags
from zipage.models.family import Family, expert_spec
from zipage.models.fields import FULL, LINEAR, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def hybrid_flags(config: PretrainedConfig, *, grouped: bool) -> dict[str, Any]:
    """Of Qwen's hybrids, their experts left out; `grouped` as in `DeltaNetSpec`."""
    linear = tuple(index for index, kind in enumerate(config.layer_types) if kind == LINEAR)
    net = DeltaNetSpec(
        layers=linear,
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        taps=config.linear_conv_kernel_dim,
        grouped=grouped,
    )
    return qwen3_flags(config) | {"norm_offset": 1.0, "recurrent": net if linear else None}


def hybrid_attention(config: PretrainedConfig, full: AttentionSpec) -> tuple[AttentionSpec, ...]:
    """Of the layers that attend. Raises ValueError where there are none, or `layer_types` is of another length."""
    count, types = config.num_hidden_layers, config.layer_types
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries: must be num_hidden_layers={shown(count)}")
    if FULL not in types:
        raise ValueError(f"layer_types has no {FULL}: models without attention are not supported")
    return (replace(full, output_gate=True),) * types.count(FULL)


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    experts = expert_spec(config, shared_width=config.shared_expert_intermediate_size) if config.num_experts else None
    return hybrid_flags(config, grouped=True) | {"experts": experts}


QWEN3_NEXT = Family(
    name="qwen3_next",
    checkpoint_class="Qwen3NextForCausalLM",
    config_class="Qwen3NextConfig",
    flags=_flags,
    layer_types=(FULL, LINEAR),
    partial_rotary=True,
    sparse=True,
    attention=hybrid_attention,
    unread=("mtp.",),
    gguf=False,
)
