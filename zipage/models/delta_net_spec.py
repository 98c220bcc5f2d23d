"""What the recurrent layers of a hybrid model are."""

from __future__ import annotations

from dataclasses import dataclass

from zipage.models.fields import check_size


@dataclass(frozen=True, kw_only=True)
class DeltaNetSpec:
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a short convolution, then a recurrence over a state of fixed
    size, which takes the place of attention.

    Attributes:
        layers: of the model that are recurrent, ascending, at least one. The others attend.
        num_key_heads: of queries and of keys.
        num_value_heads: a multiple of `num_key_heads`; each has a state of its own.
        key_dim, value_dim: of each head.
        taps: K of the convolution.
        grouped: checkpoints store the projections of each key head together (Qwen3-Next); else one after another.

    Raises:
        ValueError: a size is out of range; the message names the field.
    """

    layers: tuple[int, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    grouped: bool

    def __post_init__(self) -> None:
        for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim", "taps"):
            check_size(f"linear attention's {name}", getattr(self, name))
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"linear_num_value_heads={self.num_value_heads} is not a multiple of "
                f"linear_num_key_heads={self.num_key_heads}"
            )

    @property
    def keys(self) -> int:
        """Width of all heads' queries, and of their keys."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all heads' values."""
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def conv_shape(self) -> tuple[int, int]:
        """What a layer keeps of a request for its convolution: K - 1 inputs, in the model's dtype."""
        return self.taps - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """What it keeps for its recurrence, in float32."""
        return self.num_value_heads, self.key_dim, self.value_dim

    def row_bytes(self, itemsize: int) -> int:
        """What all layers keep of a request, where the model's dtype takes `itemsize` bytes."""
        state = 4 * self.num_value_heads * self.key_dim * self.value_dim
        return len(self.layers) * (itemsize * (self.taps - 1) * self.channels + state)

    def token_weights(self, width: int) -> int:
        """Multiplications of one token, in one layer of a model of this width."""
        projections = self.channels + 2 * self.values + 2 * self.num_value_heads
        return width * projections + 3 * self.num_value_heads * self.key_dim * self.value_dim
