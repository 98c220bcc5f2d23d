"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), with frequency scaling."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys of `rope_parameters` that are read, or that change no result ("type" is the old name of "rope_type").
KNOWN_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
        "partial_rotary_factor",
        "finetuned",
    }
)


def rope_frequencies(config: PretrainedConfig, head_dim: int) -> tuple[Tensor, float]:
    """Frequencies of a transformers config, as transformers itself computes them.

    `linear` divides them (position interpolation, arXiv:2306.15595), `llama3` by wavelength, `yarn` by part
    (arXiv:2309.00071).

    Returns:
        float32 [head_dim / 2] on the CPU, and the factor on cos and sin (1.0 unless `yarn`).

    Raises:
        ValueError: the type is not one of `ROPE_TYPES`, a key is unknown or lacking, or only a part of the head
            rotates.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(config)
    config.head_dim = head_dim
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(parameters) - KNOWN_KEYS)
    if unknown:
        raise ValueError(f"rope_parameters: {', '.join(unknown)} not supported with rope_type={rope_type!r}")
    if (parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']!r} is not supported; only 1.0")
    try:
        if rope_type == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
            return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # RuntimeError: torch's overflow
        raise ValueError(f"rope_parameters of rope_type={rope_type!r} lack or misstate {error}") from error
    return inv_freq.float(), float(factor)


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of positions, computed in float32 as they are needed.

    A forward pass computes them once for all layers, so there is no table: nothing bounds the position and nothing
    lies in memory.

    Args:
        inv_freq: float [head_dim / 2].
        attention_factor: factor on cos and sin.
    """

    def __init__(self, inv_freq: Tensor, attention_factor: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        self.attention_factor = attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> float32 cos [T, 1, head_dim] (each half the same) and sin [T, 1, head_dim / 2]."""
        angles = (positions[:, None].float() * self.inv_freq)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat((cos, cos), dim=-1), sin
