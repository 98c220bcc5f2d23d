"""The gated MLP of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.gelu_mul import gelu_mul
from kernels.linear import linear
from kernels.silu_mul import silu_mul
from zipage.models.shard import Piece, Shard


def new_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialised, and without a gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


class GatedMLP(nn.Module):
    """SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202). gate and up are rows of one weight, in this order.

    Args:
        width: of the residual stream.
        inner: of gate and of up.
        bias: all projections carry one.
        fused: a checkpoint stores gate and up as one tensor too.
        activation: of the gate, one of `GATES`.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        bias: bool,
        fused: bool,
        activation: str = "silu",
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard,
    ) -> None:
        super().__init__()
        self.shard = shard
        self.gate_up = (shard.piece(0, inner),) * 2
        self.down = shard.piece(1, inner)
        self._fused = fused
        self._gate = GATES[activation]
        gate_up_width = sum(piece.count for piece in self.gate_up)
        options = {"dtype": dtype, "device": device}
        self.gate_up_weight = new_parameter(gate_up_width, width, **options)
        self.gate_up_bias = new_parameter(gate_up_width, **options) if bias else None
        self.down_weight = new_parameter(width, self.down.count, **options)
        self.down_bias = new_parameter(width, **options) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, width] -> the rank's part of [T, width], in place 1 (`Shard.row_parallel`)."""
        gated = self._gate(linear(x, self.gate_up_weight, self.gate_up_bias))
        return self.shard.row_parallel(gated, self.down_weight, self.down_bias, 1)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.pieces`."""
        return {"gate_up_weight": self.gate_up, "gate_up_bias": self.gate_up, "down_weight": (self.down,)}

    def weight_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.weight_pieces`."""
        return row_pieces(self._names, self.gate_up) | {"down_proj.weight": (self.down,)}

    def weight_views(self) -> dict[str, Tensor]:
        """As `Decoder.weight_views`."""
        views = row_views(self._names, self.gate_up, self.gate_up_weight, self.gate_up_bias)
        views["down_proj.weight"] = self.down_weight
        return views if self.down_bias is None else views | {"down_proj.bias": self.down_bias}

    @property
    def _names(self) -> tuple[str, ...]:
        return ("gate_up_proj",) if self._fused else ("gate_proj", "up_proj")


def row_pieces(names: tuple[str, ...], pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
    """`weight_pieces` of projections that are rows of one parameter: each has a name, or one name is that of all."""
    held = [pieces] if len(names) == 1 else [(piece,) for piece in pieces]
    return {f"{name}.{kind}": own for name, own in zip(names, held, strict=True) for kind in ("weight", "bias")}


def row_views(
    names: tuple[str, ...], pieces: tuple[Piece, ...], weight: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """`weight_views` of the same."""
    counts = [piece.count for piece in pieces]
    widths = [sum(counts)] if len(names) == 1 else counts
    views = {f"{name}.weight": part for name, part in zip(names, weight.split(widths), strict=True)}
    if bias is not None:
        views |= {f"{name}.bias": part for name, part in zip(names, bias.split(widths), strict=True)}
    return views


def prefixed(prefix: str, values: dict[str, object]) -> dict:
    """With `prefix` and a dot before each name."""
    return {f"{prefix}.{name}": value for name, value in values.items()}
