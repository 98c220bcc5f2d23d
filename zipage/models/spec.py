"""What a model is: its shapes and flags, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from zipage.models.attention import AttentionSpec
from zipage.models.delta_net_spec import DeltaNetSpec
from zipage.models.expert_spec import ExpertSpec
from zipage.models.fields import check_size, is_number, shown
from zipage.models.quantization import Quantization


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes and flags of a decoder-only model.

    Attributes:
        architecture: name of its family in the registry.
        vocab_size: rows of the embedding.
        width: of the residual stream.
        attention: of each layer that attends, all but the recurrent ones. All have the same heads, since one tensor
            holds the keys of all.
        recurrent: which other layers there are, and what they compute; None: all layers attend.
        mlp_width: inner width of the gated MLP of layers without experts.
        experts: of the other layers; None: there are none.
        rms_norm_eps: epsilon of every RMSNorm.
        norm_offset: added to the weight of every RMSNorm (1 in Gemma's models).
        inv_freq: rotary frequencies in radians per position, scaling applied: half as many as dimensions of a head
            rotate, the first ones.
        long_inv_freq: those of contexts longer than `short_context` tokens (LongRoPE); None: the same.
        short_context: where `long_inv_freq` begins.
        local_inv_freq: rotary frequencies of layers with a window; None: the same.
        rope_attention_factor: factor on cos and sin (YaRN, LongRoPE).
        max_position: positions that the model is made for, rope scaling included, or those of its sliding window.
        qkv_bias, output_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm on each head's q and k before rotary.
        output_norms: RMSNorm of what attention and the MLP add to the residual stream, before they do.
        activation: of the gate of MLPs, "silu" or "gelu_tanh".
        embedding_scale: factor on embeddings, rounded to their dtype.
        logit_cap: c, where logits x become c * tanh(x / c); None: they stay.
        fused_weights: checkpoints store q, k and v as one tensor, and gate and up as one.
        quantization: how the checkpoint stores weights that are dequantized when loaded; None: there are none.
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
    recurrent: DeltaNetSpec | None = None
    experts: ExpertSpec | None = None
    rms_norm_eps: float
    norm_offset: float = 0.0
    inv_freq: tuple[float, ...]
    long_inv_freq: tuple[float, ...] | None = None
    short_context: int = 0
    local_inv_freq: tuple[float, ...] | None = None
    rope_attention_factor: float = 1.0
    max_position: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    output_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    fused_weights: bool = False
    quantization: Quantization | None = None
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
        if self.logit_cap is not None and (not is_number(self.logit_cap) or self.logit_cap <= 0):
            raise ValueError(f"logit_cap={shown(self.logit_cap)}: must be a finite number above 0")
        frequencies = *self.inv_freq, *(self.long_inv_freq or ()), *(self.local_inv_freq or ())
        if not all(0 < frequency < math.inf for frequency in frequencies):
            raise ValueError("a rotary frequency is not above 0 or not finite: rope_theta or its scaling is wrong")

    def frequencies(self, context: int) -> tuple[float, ...]:
        """Rotary frequencies where no context has more than `context` tokens.

        They are one set for all requests, since keys in the cache stay as they were rotated.
        """
        return self.inv_freq if self.long_inv_freq is None or context <= self.short_context else self.long_inv_freq

    def check_rotary_pairs(self, who: str) -> None:
        """Raise a ValueError where a part of a head rotates alone, or frequencies depend on the context's length."""
        rotated = 2 * len(self.inv_freq)
        if rotated != self.head_dim:
            raise ValueError(
                f"policy={who}: needs heads whose dimensions all rotate; of this model's {self.head_dim} {rotated} do: "
                "take another policy"
            )
        if self.long_inv_freq is not None:
            raise ValueError(
                f"policy={who}: needs one set of rotary frequencies, and LongRoPE has two: take another policy"
            )

    def refuse_hybrids(self, option: str, remedy: str) -> None:
        """Raise a ValueError that names an option that takes neither recurrent layers nor output gates."""
        if self.recurrent is not None or self.attention[0].output_gate:
            raise ValueError(f"{option}: {self.architecture} is not supported: {remedy}")

    def experts_of(self, layer: int) -> ExpertSpec | None:
        """None: the layer has a plain MLP."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def mlp_widths(self) -> dict[str, int]:
        """Whose inner width -> the width, of all MLPs that some layer has."""
        experts = self.experts
        if experts is None:
            return {"the MLP's": self.mlp_width}
        widths = {"the MLP's": self.mlp_width} if experts.dense_layers else {}
        widths |= {"the experts'": experts.width} if len(experts.dense_layers) < self.depth else {}
        return widths | ({"the shared expert's": experts.shared_width} if experts.shared_width else {})

    @property
    def token_operations(self) -> int:
        """Of the products of one token of a prompt, all layers; the head comes once a prompt, and isn't counted."""
        weights = 0
        for layer in range(self.depth):
            experts = self.experts_of(layer)
            mlp = self.mlp_width if experts is None else experts.num_active * experts.width + experts.shared_width
            weights += self.width * 3 * mlp
        heads = (3 if self.attention[0].output_gate else 2) * self.num_heads + 2 * self.num_kv_heads
        weights += self.num_layers * self.width * heads * self.head_dim
        if self.recurrent is not None:
            weights += len(self.recurrent.layers) * self.recurrent.token_weights(self.width)
        return 2 * weights

    @property
    def pair_operations(self) -> int:
        """Of the attention of one token to one entry, all layers but those that slide."""
        return 4 * len(self.full_layers) * self.num_heads * self.head_dim

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """Numbers of the layers whose cache holds a window and no more: those with a window, where others have none."""
        sliding = tuple(index for index, layer in enumerate(self.attention) if layer.window is not None)
        return sliding if len(sliding) < self.num_layers else ()

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Numbers of the other layers, whose entries policies rank."""
        sliding = set(self.sliding_layers)
        return tuple(index for index in range(self.num_layers) if index not in sliding)

    @property
    def sliding_window(self) -> int:
        """Entries that the widest window of `sliding_layers` sees; 0: there are none."""
        return max((self.attention[index].window for index in self.sliding_layers), default=0)

    @property
    def full(self) -> ModelSpec:
        """The same of `full_layers` alone, as their cache and compressions take it."""
        return self.of_layers(self.full_layers) if self.sliding_layers else self

    def of_layers(self, numbers: Sequence[int]) -> ModelSpec:
        """The same of some of the layers that attend."""
        return replace(self, attention=tuple(self.attention[index] for index in numbers))

    @property
    def num_layers(self) -> int:
        """Layers that attend: those of the cache."""
        return len(self.attention)

    @property
    def depth(self) -> int:
        """All layers."""
        return self.num_layers + (0 if self.recurrent is None else len(self.recurrent.layers))

    @property
    def num_heads(self) -> int:
        return self.attention[0].num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention[0].head_dim
