"""What a model is: its shapes and flags, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from zipage.models.attention import AttentionSpec
from zipage.models.fields import check_size, is_number, shown


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes and flags of a decoder-only model.

    Attributes:
        architecture: name of its family in the registry.
        vocab_size: rows of the embedding.
        width: of the residual stream.
        attention: of each layer. All layers have the same heads, since one tensor holds the keys of all.
        mlp_width: inner width of the gated MLP.
        rms_norm_eps: epsilon of every RMSNorm.
        inv_freq: rotary frequencies in radians per position, `head_dim / 2` of them, scaling applied.
        rope_attention_factor: factor on cos and sin (YaRN).
        max_position: positions that the model is made for, rope scaling included.
        qkv_bias, output_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm on each head's q and k before rotary.
        tie_embeddings: the embedding is the output projection too.
        eos_token_ids: ids that end a sequence, ascending.
        dtype: of the checkpoint; None where its config does not say.

    Raises:
        ValueError: a value is out of range, or layers differ in their heads; the message names the field.
    """

    architecture: str
    vocab_size: int
    width: int
    attention: tuple[AttentionSpec, ...]
    mlp_width: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]
    rope_attention_factor: float = 1.0
    max_position: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "mlp_width", "max_position"):
            check_size(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_attention_factor"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ValueError(f"{name}={shown(value)}: must be a finite number, at least 0")
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            found = sorted({getattr(layer, name) for layer in self.attention})
            if len(found) > 1:
                raise ValueError(f"layers that differ in {name} ({', '.join(map(str, found))}) are not supported")
        if not all(0 < frequency < math.inf for frequency in self.inv_freq):
            raise ValueError("a rotary frequency is not above 0 or not finite: rope_theta or its scaling is wrong")

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def num_heads(self) -> int:
        return self.attention[0].num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention[0].head_dim
