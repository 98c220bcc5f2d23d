"""Qwen3.5, of text alone: the hybrid of Qwen3-Next with plain MLPs and one projection a purpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zipage.models.families.qwen3_next import hybrid_attention, hybrid_flags
from zipage.models.family import Family
from zipage.models.fields import FULL, LINEAR

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""Which of an image's three positions turns which dimensions: in a text all three are the same."""


def _flags(config: PretrainedConfig) -> dict[str, Any]:
    return hybrid_flags(config, grouped=False)


def _rope(config: PretrainedConfig) -> tuple[Mapping[str, Any], None]:
    return {name: value for name, value in config.rope_parameters.items() if name not in OF_IMAGES}, None


QWEN3_5_TEXT = Family(
    name="qwen3_5_text",
    checkpoint_class="Qwen3_5ForCausalLM",
    config_class="Qwen3_5TextConfig",
    flags=_flags,
    layer_types=(FULL, LINEAR),
    rope=_rope,
    partial_rotary=True,
    attention=hybrid_attention,
    unread=("mtp.",),
    gguf=False,
)
