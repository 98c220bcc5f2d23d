"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): q, k and v always carry a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zipage.models.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, bool]:
    if getattr(config, "attention_bias", True) is not True:
        raise ValueError(f"attention_bias={config.attention_bias!r} is not supported with qwen2, which has biases")
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias={config.mlp_bias!r} is not supported with qwen2")
    return {"qkv_bias": True}


QWEN2 = Family(name="qwen2", checkpoint_class="Qwen2ForCausalLM", config_class="Qwen2Config", flags=_flags)
