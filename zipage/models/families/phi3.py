"""Phi-3 and Phi-4 (arXiv:2404.14219, arXiv:2412.08905): fused projections, a part of each head rotates (LongRoPE), and
all layers may have one sliding window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zipage.models.family import Family, refuse_biases

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, bool]:
    refuse_biases(config)
    return {"fused_weights": True}


PHI3 = Family(
    name="phi3",
    checkpoint_class="Phi3ForCausalLM",
    config_class="Phi3Config",
    flags=_flags,
    window=lambda config: config.sliding_window,
    partial_rotary=True,
)
