"""Qwen2's mixtures of experts (arXiv:2407.10671), with an expert that all tokens go through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zipage.models.family import QWEN_EXPERT_KEYS, Family, expert_spec, refuse_biases

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    refuse_biases(config)
    experts = expert_spec(config, shared_width=config.shared_expert_intermediate_size)
    return {"qkv_bias": config.qkv_bias, "experts": experts}


QWEN2_MOE = Family(
    name="qwen2_moe",
    checkpoint_class="Qwen2MoeForCausalLM",
    config_class="Qwen2MoeConfig",
    flags=_flags,
    sparse=True,
    gguf_keys=QWEN_EXPERT_KEYS,
    gguf_fields={"norm_topk_prob": False},
)
