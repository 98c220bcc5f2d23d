"""What attention is in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zipage.models.fields import check_size, is_number, shown


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Attention of one layer.

    Attributes:
        num_heads: of queries, a multiple of `num_kv_heads`.
        num_kv_heads: of keys and values.
        head_dim: of each head; even.
        scale: factor on the logits.
        window: latest entries that a query sees, its own included; None: all.
        soft_cap: c, where logits x become c * tanh(x / c); None: they stay.
        sinks: each head has a learned logit that takes a share of the softmax and adds nothing to the output.
        output_gate: each head's output is multiplied by the sigmoid of a gate, whose rows in the query's projection
            follow the head's.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even")
        if self.window is not None:
            check_size("window", self.window)
        for name, value in (("scale", self.scale), ("soft_cap", self.soft_cap)):
            if value is not None and (not is_number(value) or value <= 0):
                raise ValueError(f"{name}={shown(value)}: must be a finite number above 0")


def refuse_forms(layers: Sequence[AttentionSpec], option: str, remedy: str) -> None:
    """Raise a ValueError that names an option that takes plain attention alone, the first layer and field that is not
    plain, and the remedy.
    """
    for index, layer in enumerate(layers):
        for name in ("window", "soft_cap", "sinks"):
            value = getattr(layer, name)
            if value:
                raise ValueError(f"{option}: attention with {name}={value} (layer {index}) is not supported: {remedy}")
