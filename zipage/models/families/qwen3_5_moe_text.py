"""Qwen3.5's mixtures of experts, of text alone: every layer has experts, and one that all tokens take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zipage.models.expert_spec import ExpertSpec
from zipage.models.families.qwen3_5_text import QWEN3_5_TEXT
from zipage.models.families.qwen3_next import hybrid_flags

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    experts = ExpertSpec(
        num_experts=config.num_experts,
        num_active=config.num_experts_per_tok,
        width=config.moe_intermediate_size,
        normalized=True,
        shared_width=config.shared_expert_intermediate_size,
    )
    return hybrid_flags(config, grouped=False) | {"experts": experts}


QWEN3_5_MOE_TEXT = replace(
    QWEN3_5_TEXT,
    name="qwen3_5_moe_text",
    checkpoint_class="Qwen3_5MoeForCausalLM",
    config_class="Qwen3_5MoeTextConfig",
    flags=_flags,
    sparse=True,
)
