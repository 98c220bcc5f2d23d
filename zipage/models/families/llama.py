"""Llama (Touvron et al. 2023, arXiv:2302.13971), 1 to 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zipage.models.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, bool]:
    if getattr(config, "sliding_window", None):
        raise ValueError(f"sliding_window={config.sliding_window!r} is not supported")
    bias = bool(getattr(config, "attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(config.mlp_bias)}


LLAMA = Family(
    name="llama",
    checkpoint_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    flags=_flags,
    gguf_rotary_pairs=True,
)
