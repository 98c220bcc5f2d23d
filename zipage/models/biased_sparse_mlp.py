"""The MLP of a sparse layer whose router and experts have biases."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kernels.clamped_swiglu import clamped_swiglu
from kernels.expert_mlp import expert_mlp
from kernels.route import route
from zipage.models.expert_spec import ExpertSpec
from zipage.models.mlp import new_parameter
from zipage.models.shard import Piece, Shard


class BiasedSparseMLP(nn.Module):
    """A mixture of experts with a clamped SwiGLU, as gpt-oss has it (arXiv:2508.10925), spread as `SparseMLP` is.

    The router is float32, whatever the model's dtype. Rows of gate and up take turns.

    Args:
        width: of the residual stream.
    """

    def __init__(self, width: int, spec: ExpertSpec, *, dtype: torch.dtype, device: torch.device, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.spec = spec
        self._rows = shard.piece(1, 2 * spec.width)
        self._columns = shard.piece(2, spec.width)
        self._once = shard.once(1, width)
        count, inner = spec.num_experts, self._columns.count
        options = {"dtype": dtype, "device": device}
        self.router_weight = new_parameter(count, width, dtype=torch.float32, device=device)
        self.router_bias = new_parameter(count, dtype=torch.float32, device=device)
        self.gate_up_weight = new_parameter(count, 2 * inner, width, **options)
        self.gate_up_bias = new_parameter(count, 2 * inner, **options)
        self.down_weight = new_parameter(count, width, inner, **options)
        self.down_bias = new_parameter(count, width, **options)
        alpha, limit = spec.swiglu
        self._gate = partial(clamped_swiglu, alpha=alpha, limit=limit)

    def forward(self, x: Tensor) -> Tensor:
        """[T, width] -> the rank's part of [T, width], in place 1 (`Shard.row_parallel`)."""
        shares, experts = route(x, self.router_weight, self.router_bias, self.spec.num_active, normalized=True)
        biases = self.gate_up_bias, self.down_bias
        weights = self.gate_up_weight, self.down_weight
        out = expert_mlp(x, experts, shares, *weights, biases=biases, gate=self._gate)
        return self.shard.part(out, 1)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.pieces`."""
        rows, columns = (self._rows,), (self._columns,)
        return {"gate_up_weight": rows, "gate_up_bias": rows, "down_weight": columns, "down_bias": (self._once,)}

    def weight_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.weight_pieces`."""
        return {
            "experts.gate_up_proj": (self._rows.along(2),),
            "experts.gate_up_proj_bias": (self._rows,),
            "experts.down_proj": (self._columns.along(1),),
            "experts.down_proj_bias": (self._once,),
        }

    def weight_views(self) -> dict[str, Tensor]:
        """As `Decoder.weight_views`. A checkpoint has experts as they are multiplied from the right."""
        return {
            "router.weight": self.router_weight,
            "router.bias": self.router_bias,
            "experts.gate_up_proj": self.gate_up_weight.mT,
            "experts.gate_up_proj_bias": self.gate_up_bias,
            "experts.down_proj": self.down_weight.mT,
            "experts.down_proj_bias": self.down_bias,
        }
