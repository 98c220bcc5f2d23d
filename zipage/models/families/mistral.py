"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama, all of whose layers may have one sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zipage.models.family import Family, refuse_biases

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, bool]:
    refuse_biases(config)
    return {}


MISTRAL = Family(
    name="mistral",
    checkpoint_class="MistralForCausalLM",
    config_class="MistralConfig",
    flags=_flags,
    window=lambda config: config.sliding_window,
)
