"""What tells one family of models from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zipage.models.attention import AttentionSpec
from zipage.models.decoder import Decoder
from zipage.models.expert_spec import ExpertSpec
from zipage.models.fields import check_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def same_in_every_layer(config: PretrainedConfig, attention: AttentionSpec) -> tuple[AttentionSpec, ...]:
    return (attention,) * config.num_hidden_layers


def no_window(config: PretrainedConfig) -> None:
    return None


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
        partial_rotary: the first dimensions of a head alone may rotate.
        sparse: layers may have experts.
        attention: the config, and full attention as the config's sizes have it -> attention of each layer.
        decoder: of its models.
        gguf_rotary_pairs: llama.cpp's converter stores rows of q and k in rotary pairs, (i, i + head_dim / 2) side by
            side.
        gguf_fields: fields of a `config.json` that are the same for all its models, and that a GGUF file lacks.
    """

    name: str
    checkpoint_class: str
    config_class: str
    flags: Callable[[PretrainedConfig], dict[str, Any]]
    window: Callable[[PretrainedConfig], int | None] = no_window
    partial_rotary: bool = False
    sparse: bool = False
    attention: Callable[[PretrainedConfig, AttentionSpec], tuple[AttentionSpec, ...]] = same_in_every_layer
    decoder: type[Decoder] = Decoder
    gguf_rotary_pairs: bool = False
    gguf_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gguf_name(self) -> str:
        """`general.architecture` in a GGUF file."""
        return self.name.replace("_", "")
