"""What the mixture of experts is in a model's sparse layers."""

from __future__ import annotations

from dataclasses import dataclass

from zipage.models.fields import check_size, is_number, shown


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """A mixture of experts: gated MLPs of which each token goes through the few that its router likes best.

    Attributes:
        num_experts: of each sparse layer.
        num_active: that a token goes through.
        width: inner width of each.
        normalized: the shares of the active experts sum to 1; else they are those of a softmax over all.
        shared_width: inner width of an expert that all tokens go through, behind a gate of its own; 0: there is none.
        swiglu: alpha and limit of `kernels.clamped_swiglu`; its experts and their router have biases (gpt-oss). None: a
            plain SwiGLU, and no biases.
        dense_layers: layers with a plain MLP instead, ascending.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    num_experts: int
    num_active: int
    width: int
    normalized: bool
    shared_width: int = 0
    swiglu: tuple[float, float] | None = None
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_active", "width"):
            check_size(name, getattr(self, name))
        if self.shared_width:
            check_size("shared_width", self.shared_width)
        for name, value in zip(("swiglu_alpha", "swiglu_limit"), self.swiglu or (), strict=False):
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name}={shown(value)}: must be a finite number above 0")
        if self.num_active > self.num_experts:
            raise ValueError(f"num_active={self.num_active}: there are {self.num_experts} experts")
