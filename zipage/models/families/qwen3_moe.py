"""Qwen3's mixtures of experts (arXiv:2505.09388)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zipage.models.families.qwen3 import flags
from zipage.models.family import QWEN_EXPERT_KEYS, Family, expert_spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    return flags(config) | {"experts": expert_spec(config)}


QWEN3_MOE = Family(
    name="qwen3_moe",
    checkpoint_class="Qwen3MoeForCausalLM",
    config_class="Qwen3MoeConfig",
    flags=_flags,
    window=lambda config: config.sliding_window,
    sparse=True,
    gguf_keys=QWEN_EXPERT_KEYS,
    gguf_fields={"norm_topk_prob": True},
)
