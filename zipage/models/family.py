"""What tells one family of models from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zipage.models.attention import AttentionSpec
from zipage.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def same_in_every_layer(config: PretrainedConfig, attention: AttentionSpec) -> tuple[AttentionSpec, ...]:
    return (attention,) * config.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: `model_type` in a `config.json`, and `general.architecture` in a GGUF file.
        checkpoint_class: what `architectures` must name in a `config.json`.
        config_class: transformers' class of its config.
        flags: the config -> fields of `ModelSpec` in which families differ. Raises ValueError for an option of the
            config that would change results and is not supported.
        attention: the config, and full attention as the config's sizes have it -> attention of each layer.
        decoder: of its models.
        gguf_rotary_pairs: llama.cpp's converter stores rows of q and k in rotary pairs, (i, i + head_dim / 2) side by
            side.
    """

    name: str
    checkpoint_class: str
    config_class: str
    flags: Callable[[PretrainedConfig], dict[str, bool]]
    attention: Callable[[PretrainedConfig, AttentionSpec], tuple[AttentionSpec, ...]] = same_in_every_layer
    decoder: type[Decoder] = Decoder
    gguf_rotary_pairs: bool = False
