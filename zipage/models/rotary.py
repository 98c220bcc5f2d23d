"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), with frequency scaling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

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
        "short_factor",
        "long_factor",
        "finetuned",
    }
)


@dataclass(frozen=True)
class Frequencies:
    """Of a model: float32 [r / 2] on the CPU, where the first r dimensions of a head rotate.

    Attributes:
        inv_freq: radians per position.
        attention_factor: factor on cos and sin (`yarn`, `longrope`).
        long_inv_freq: of contexts longer than `short_context` tokens (`longrope`); None: the same.
    """

    inv_freq: Tensor
    attention_factor: float = 1.0
    long_inv_freq: Tensor | None = None
    short_context: int = 0


def rope_frequencies(
    config: PretrainedConfig, head_dim: int, parameters: Mapping[str, Any] | None = None, *, partial: bool = False
) -> Frequencies:
    """Frequencies of a transformers config, as transformers itself computes them.

    `linear` divides them (position interpolation, arXiv:2306.15595), `llama3` by wavelength, `yarn` by part
    (arXiv:2309.00071), `longrope` by a factor each, others in long contexts (arXiv:2402.13753).

    Args:
        parameters: `rope_parameters` of some layers; None: the config's.
        partial: a part of the head alone may rotate (`partial_rotary_factor`).

    Raises:
        ValueError: the type is not one of `ROPE_TYPES`, a key is unknown, lacking or misstated, or only a part of the
            head rotates and `partial` is false.
    """
    config = copy.deepcopy(config)
    config.head_dim = head_dim
    if parameters is not None:
        config.rope_parameters = dict(parameters)
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(parameters) - KNOWN_KEYS)
    if unknown:
        raise ValueError(f"rope_parameters: {', '.join(unknown)} not supported with rope_type={rope_type!r}")
    share = parameters.get("partial_rotary_factor") or 1.0
    if share != 1.0 and not partial:
        raise ValueError(f"partial_rotary_factor={share!r} is not supported; only 1.0")
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise ValueError(
            f"partial_rotary_factor={share!r}: rotates {rotary_dim} of {head_dim} dimensions, must be even"
        )
    try:
        return _frequencies(config, rope_type, rotary_dim)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # RuntimeError: torch's overflow
        raise ValueError(f"rope_parameters of rope_type={rope_type!r} lack or misstate {error}") from error


def _frequencies(config: PretrainedConfig, rope_type: str, rotary_dim: int) -> Frequencies:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, device = config.rope_parameters, torch.device("cpu")
    if rope_type == "default":
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        return Frequencies(1.0 / (parameters["rope_theta"] ** exponents))
    if rope_type != "longrope":
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, device)
        return Frequencies(inv_freq.float(), float(factor))
    for name in ("short_factor", "long_factor"):
        if len(parameters[name]) != rotary_dim // 2:
            raise ValueError(f"{name}: {len(parameters[name])} factors, not {rotary_dim // 2}")
    short_context = parameters["original_max_position_embeddings"]
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, device)
    long_inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](config, device, seq_len=short_context + 1)
    return Frequencies(inv_freq.float(), float(factor), long_inv_freq.float(), short_context)


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of positions, computed in float32 as they are needed.

    A forward pass computes them once for all layers, so there is no table: nothing bounds the position and nothing
    lies in memory.

    Args:
        inv_freq: float [r / 2], where the first r dimensions of a head rotate.
        attention_factor: factor on cos and sin.
    """

    def __init__(self, inv_freq: Tensor, attention_factor: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        self.attention_factor = attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> float32 cos [T, 1, r] (each half the same) and sin [T, 1, r / 2]."""
        angles = (positions[:, None].float() * self.inv_freq)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat((cos, cos), dim=-1), sin
