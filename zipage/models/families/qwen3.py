"""Qwen3 (arXiv:2505.09388), dense: an RMSNorm on each head's q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zipage.models.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def flags(config: PretrainedConfig) -> dict[str, bool]:
    """Of both kinds of MLP."""
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias={config.mlp_bias!r} is not supported with {config.model_type}")
    bias = bool(getattr(config, "attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}


QWEN3 = Family(name="qwen3", checkpoint_class="Qwen3ForCausalLM", config_class="Qwen3Config", flags=flags)
