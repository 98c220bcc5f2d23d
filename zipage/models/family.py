"""What tells one family of models from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zipage.models.attention import AttentionSpec
from zipage.models.decoder import Decoder
from zipage.models.expert_spec import ExpertSpec
from zipage.models.fields import FULL, SLIDING, check_size, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def same_in_every_layer(config: PretrainedConfig, attention: AttentionSpec) -> tuple[AttentionSpec, ...]:
    return (attention,) * config.num_hidden_layers


def by_layer_type(config: PretrainedConfig, attention: AttentionSpec) -> tuple[AttentionSpec, ...]:
    """As `layer_types` has it: layers with `sliding_window`, and others. Raises ValueError where the two don't fit."""
    count, types = config.num_hidden_layers, config.layer_types
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries: must be num_hidden_layers={shown(count)}")
    if SLIDING in types:
        check_size("sliding_window", config.sliding_window)
    windowed = replace(attention, window=config.sliding_window)
    return tuple(windowed if kind == SLIDING else attention for kind in types)


def same_rope(config: PretrainedConfig) -> tuple[Mapping[str, Any], None]:
    return config.rope_parameters, None


def no_window(config: PretrainedConfig) -> None:
    return None


QWEN_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""`Family.gguf_keys` of Qwen's mixtures."""


def refuse_biases(config: PretrainedConfig) -> None:
    """Raise a ValueError for a bias that transformers' class of the model does not have."""
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"{name}={getattr(config, name)!r} is not supported with {config.model_type}")


def expert_spec(config: PretrainedConfig, shared_width: int = 0) -> ExpertSpec:
    """Of the fields that Qwen's mixtures share. Raises ValueError where they make no mixture."""
    step = config.decoder_sparse_step
    check_size("decoder_sparse_step", step)
    layers = range(config.num_hidden_layers)
    return ExpertSpec(
        num_experts=config.num_experts,
        num_active=config.num_experts_per_tok,
        width=config.moe_intermediate_size,
        normalized=config.norm_topk_prob,
        shared_width=shared_width,
        dense_layers=tuple(i for i in layers if i in config.mlp_only_layers or (i + 1) % step),
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: `model_type` in a `config.json`.
        checkpoint_class: what `architectures` must name in a `config.json`.
        config_class: transformers' class of its config.
        flags: the config -> fields of `ModelSpec` in which families differ. Raises ValueError for an option of the
            config that would change results and is not supported.
        window: latest entries that a query of any layer sees, as the config has it; None: all. Contexts end there, so
            that no query misses an entry.
        layer_types: entries that `layer_types` of a config may have.
        hidden_act: names of the activation that MLPs may have; None: `flags` reads it from another field.
        rope: the config -> rotary parameters of its layers, and others of those with a window; None: the same.
        stretches_positions: `max_position_embeddings` counts positions before `linear` rotary scaling.
        quantization: `quant_method` of checkpoints that are dequantized on load (`KINDS` in `quantization.py`).
        partial_rotary: the first dimensions of a head alone may rotate.
        sparse: layers may have experts.
        attention: the config, and full attention as the config's sizes have it -> attention of each layer.
        decoder: of its models.
        unread: how names of tensors begin that no part of a decoder is made of (heads that predict several tokens).
        gguf: GGUF files of its models can be read.
        gguf_rotary_pairs: llama.cpp's converter stores rows of q and k in rotary pairs, (i, i + head_dim / 2) side by
            side.
        gguf_architecture: `general.architecture` in a GGUF file; None: `name` without underscores.
        gguf_keys: keys under the architecture's name in a GGUF file that other families lack -> fields of a
            `config.json`.
        gguf_names: tensors of a layer that a GGUF file names otherwise than those of other families.
        gguf_fields: fields of a `config.json` that are the same for all its models, and that a GGUF file lacks.
        gguf_config: fields of a `config.json` as a GGUF file's keys give them -> as the family has them.
    """

    name: str
    checkpoint_class: str
    config_class: str
    flags: Callable[[PretrainedConfig], dict[str, Any]]
    window: Callable[[PretrainedConfig], int | None] = no_window
    layer_types: tuple[str, ...] = (FULL,)
    hidden_act: tuple[str, ...] | None = ("silu", "swish")
    rope: Callable[[PretrainedConfig], tuple[Mapping[str, Any], Mapping[str, Any] | None]] = same_rope
    stretches_positions: bool = True
    quantization: tuple[str, ...] = ("fp8",)
    partial_rotary: bool = False
    sparse: bool = False
    attention: Callable[[PretrainedConfig, AttentionSpec], tuple[AttentionSpec, ...]] = same_in_every_layer
    decoder: type[Decoder] = Decoder
    unread: tuple[str, ...] = ()
    gguf: bool = True
    gguf_rotary_pairs: bool = False
    gguf_architecture: str | None = None
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_fields: Mapping[str, Any] = field(default_factory=dict)
    gguf_config: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def gguf_name(self) -> str:
        """`general.architecture` in a GGUF file."""
        return self.gguf_architecture or self.name.replace("_", "")
